"""ServerContext: everything that the routes of one server share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lmdeploy.engine.metrics import EngineStats
from lmdeploy.errors import RequestError
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.serve.admission import Admission
from lmdeploy.serve.audit import AuditLog
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.deadline import Deadline
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.media import Media, MediaRules
from lmdeploy.serve.meter import EngineMeter, Meter
from lmdeploy.serve.metrics import ServerMetrics
from lmdeploy.serve.middleware import Cors
from lmdeploy.serve.parsers import ParserNames, for_template

State = Literal['loading', 'ready', 'restarting', 'failed', 'sleeping', 'closed']
PREPARE_THREADS = 2  # templates hold the interpreter's lock, tokenizers do not


class Health(Protocol):
    """How the engine is."""

    @property
    def state(self) -> State: ...

    @property
    def reason(self) -> str: ...

    @property
    def restarts(self) -> int: ...

    @property
    def last_step_age(self) -> float: ...


@dataclass(frozen=True, slots=True)
class HealthReport:
    """A :class:`Health` that is made here."""

    state: State
    reason: str = ''
    restarts: int = 0
    last_step_age: float = 0.0


class Engine(Protocol):
    """The engine as the server sees it, from before it is loaded until it is closed."""

    @property
    def frontend(self) -> AsyncFrontend | None:
        """Serves requests; None until the model is loaded."""

    def health(self) -> Health: ...

    async def sleep(self) -> None:
        """Give back its memory. Raises: HttpError LMD-513, it cannot."""

    async def wakeup(self) -> None:
        """Serve again after :meth:`sleep`; returns when it does."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that is ready from the beginning."""

    frontend: AsyncFrontend

    def health(self) -> Health:
        return HealthReport('ready')

    async def sleep(self) -> None:
        raise HttpError('LMD-513', param='/sleep', reason='the engine runs in the process of the server')

    async def wakeup(self) -> None:
        raise HttpError('LMD-513', param='/wakeup', reason='the engine runs in the process of the server')


@dataclass(slots=True, eq=False)
class Running:
    """A request that the engine works on, as far as others may ask for its end."""

    caller: str
    request_id: str
    session_id: int
    end: Callable[[], None]
    aborted: bool = False

    def abort(self) -> None:
        """Tell the engine to end it; its client gets what there is, with the finish reason ``'abort'``."""
        self.aborted = True
        self.end()


@dataclass(slots=True)
class ServerContext:
    """One server's state. Only its event loop's thread changes it.

    Args:
        model_names: the names that requests may give as ``model``; the first is the canonical one.
        engine: loading or loaded.
        tool_parser, reasoning_parser: by name; None: that which the model's template calls for; ``'none'``: none.
        check_host: refuse Host headers that are not loopback names.
        public_metrics: ``/metrics`` without a key.
        docs: serve ``/docs`` and ``/openapi.json``.
        page: serve the chat page at ``/``.
        expose_metrics: serve ``/metrics``.
        share_prefix_cache: let the requests of different keys share cached prefixes.
        created: Unix time that ``/v1/models`` tells.
        media_rules: where pictures may come from.
        terminate: shuts the server down; None: clients cannot ask for that.
    """

    model_names: tuple[str, ...]
    engine: Engine
    keys: KeyRing = field(default_factory=KeyRing)
    limits: Limits = field(default_factory=Limits)
    cors: Cors = field(default_factory=Cors)
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    check_host: bool = False
    public_metrics: bool = False
    docs: bool = True
    page: bool = True
    expose_metrics: bool = True
    share_prefix_cache: bool = False
    max_concurrent_requests: int = 0
    audit: AuditLog | None = None
    created: int = 0
    media_rules: MediaRules = MediaRules()
    terminate: Callable[[], None] | None = None
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    draining: bool = False
    running: list[Running] = field(default_factory=list)
    deadlines: set[Deadline] = field(default_factory=set)
    admission: Admission = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)
    media: Media = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits, most=self.max_concurrent_requests)
        self.pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix='lmdeploy-prepare')
        self.media = Media(self.media_rules, self.limits)

    def frontend(self) -> AsyncFrontend:
        """The way to the engine.

        Raises:
            HttpError: LMD-518 it is loading, LMD-519 it failed, LMD-520 the server is shutting down.
        """
        if self.draining:
            raise HttpError('LMD-520', retry_after=5)
        health, frontend = self.engine.health(), self.engine.frontend
        if health.state == 'loading' or (health.state == 'ready' and frontend is None):
            raise HttpError('LMD-518', retry_after=5)
        if health.state != 'ready' or frontend is None:
            raise HttpError('LMD-519', reason=f'it is {health.state}', state=health.state, retry_after=5)
        self.admission.batch = frontend.capacity.max_batch_size
        return frontend

    def frontend_loaded(self) -> AsyncFrontend:
        """The way to the engine for what has begun already: it may be finished while the server drains."""
        frontend = self.engine.frontend
        assert frontend is not None, 'nothing runs before the engine is loaded'
        return frontend

    async def load_pictures(self, frontend: AsyncFrontend, prompt: Prompt) -> Prompt:
        """``prompt`` with its pictures loaded.

        Raises:
            RequestError: LMD-304, the model reads text only; HttpError: a picture cannot be had.
        """
        if not prompt.has_pictures:
            return prompt
        if frontend.pictures is None:
            raise RequestError('LMD-304')
        return await self.media.load(prompt)

    def parser_names(self, frontend: AsyncFrontend) -> ParserNames:
        """The parsers for this model's answers."""
        template = frontend.template
        found = for_template(template.name, frontend.tokenizer.chat_template if template.name == 'hf' else None)
        names = (self.tool_parser or found.tools, self.reasoning_parser or found.reasoning)
        return ParserNames(*(None if name == 'none' else name for name in names))

    def meter(self) -> Meter:
        return EngineMeter(self)

    def stats(self) -> EngineStats | None:
        """The engine's counters; None until it is loaded."""
        frontend = self.engine.frontend
        return None if frontend is None else frontend.client.stats()

    def check_model(self, name: str) -> None:
        """Raises: HttpError LMD-514, the name is not served."""
        if name not in self.model_names:
            raise HttpError('LMD-514', model=name[:200], served=', '.join(self.model_names)[:1000], param='model')
