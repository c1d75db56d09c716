"""Errors of the HTTP interface: a closed table from error codes to status, type and name, and the one body they have.

The body satisfies both OpenAI's clients (``error``) and LMDeploy's (the flat keys). Its message is the text of the
error's code: exceptions that are not in the table are answered with LMD-521, and what they say never leaves the server.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from lmdeploy.errors import ConfigError, EngineDead, LmdeployError, LoadError, RequestError, TemplateError


class HttpError(LmdeployError):
    """A request is refused by the server itself.

    Of its parameters, ``param`` is the field that is at fault, and ``retry_after`` the seconds to wait.
    """


@dataclass(frozen=True, slots=True)
class Fault:
    """How an error is answered.

    Attributes:
        status: HTTP status.
        type: OpenAI's class of error.
        code: its stable name.
        hidden: the text names things that are none of the client's business.
    """

    status: int
    type: str
    code: str
    hidden: bool = False


INVALID = Fault(400, 'invalid_request_error', 'invalid_request')
UNSUPPORTED = Fault(400, 'invalid_request_error', 'unsupported_feature')
TOO_LONG = Fault(400, 'invalid_request_error', 'context_length_exceeded')
IMAGE = Fault(400, 'invalid_request_error', 'invalid_image')
UNAVAILABLE = Fault(503, 'server_error', 'engine_unavailable', hidden=True)
INTERNAL = Fault(500, 'server_error', 'internal_error', hidden=True)

FAULTS: dict[str, Fault] = {
    'LMD-301': TOO_LONG,
    'LMD-307': TOO_LONG,
    'LMD-304': UNSUPPORTED,
    'LMD-308': UNSUPPORTED,
    'LMD-309': TOO_LONG,
    'LMD-313': UNSUPPORTED,
    'LMD-317': UNSUPPORTED,
    'LMD-207': Fault(503, 'server_error', 'out_of_memory', hidden=True),
    'LMD-330': TOO_LONG,
    'LMD-332': TOO_LONG,
    'LMD-667': IMAGE,
    'LMD-668': IMAGE,
    'LMD-669': IMAGE,
    'LMD-671': IMAGE,
    'LMD-678': Fault(400, 'invalid_request_error', 'image_not_fetched'),
    'LMD-679': Fault(400, 'invalid_request_error', 'image_url_not_allowed'),
    'LMD-683': IMAGE,
    'LMD-334': Fault(500, 'server_error', 'numerical_error'),
    'LMD-335': Fault(500, 'server_error', 'grammar_dead_end'),
    'LMD-336': INTERNAL,
    'LMD-337': INTERNAL,
    'LMD-504': Fault(401, 'invalid_request_error', 'invalid_api_key'),
    'LMD-505': Fault(403, 'permission_error', 'admin_key_required'),
    'LMD-506': Fault(404, 'invalid_request_error', 'not_found'),
    'LMD-507': Fault(405, 'invalid_request_error', 'method_not_allowed'),
    'LMD-508': Fault(415, 'invalid_request_error', 'unsupported_media_type'),
    'LMD-509': Fault(413, 'invalid_request_error', 'body_too_large'),
    'LMD-510': Fault(431, 'invalid_request_error', 'headers_too_large'),
    'LMD-511': Fault(400, 'invalid_request_error', 'invalid_json'),
    'LMD-512': INVALID,
    'LMD-513': UNSUPPORTED,
    'LMD-514': Fault(404, 'invalid_request_error', 'model_not_found'),
    'LMD-515': Fault(503, 'server_error', 'server_busy'),
    'LMD-516': Fault(429, 'rate_limit_error', 'rate_limit_exceeded'),
    'LMD-517': Fault(504, 'server_error', 'deadline_exceeded'),
    'LMD-518': Fault(503, 'server_error', 'model_loading'),
    'LMD-519': Fault(503, 'server_error', 'engine_unavailable'),
    'LMD-520': Fault(503, 'server_error', 'shutting_down'),
    'LMD-521': Fault(500, 'server_error', 'internal_error'),
    'LMD-522': Fault(403, 'permission_error', 'host_not_allowed'),
    'LMD-523': Fault(500, 'server_error', 'slow_reader'),
    'LMD-524': Fault(409, 'invalid_request_error', 'request_conflict'),
    'LMD-525': Fault(404, 'invalid_request_error', 'request_not_found'),
    'LMD-526': Fault(408, 'invalid_request_error', 'body_timeout'),
    'LMD-530': Fault(499, 'invalid_request_error', 'request_cancelled'),
    'LMD-531': Fault(503, 'server_error', 'too_many_connections'),
    'LMD-532': Fault(429, 'rate_limit_error', 'too_many_connections'),
    'LMD-533': Fault(429, 'rate_limit_error', 'too_many_wrong_keys'),
    'LMD-534': Fault(404, 'invalid_request_error', 'response_not_found'),
    'LMD-560': Fault(401, 'invalid_request_error', 'invalid_node_key'),
    'LMD-561': Fault(400, 'invalid_request_error', 'invalid_node'),
    'LMD-562': Fault(503, 'server_error', 'no_node'),
    'LMD-563': INVALID,
    'LMD-564': Fault(502, 'server_error', 'node_failed'),
    'LMD-565': Fault(502, 'server_error', 'node_failed'),
    'LMD-566': Fault(504, 'server_error', 'node_timeout'),
    'LMD-567': Fault(503, 'server_error', 'too_many_nodes'),
    'LMD-568': Fault(404, 'invalid_request_error', 'node_not_found'),
    'LMD-570': Fault(502, 'server_error', 'node_failed'),
    'LMD-572': Fault(503, 'server_error', 'server_busy'),
}
PARAMS = {'max_new_tokens': 'max_tokens', 'random_seed': 'seed', 'stop_words': 'stop'}
"""Names of generation parameters that requests spell differently."""
FIELDS = {'LMD-179': 'chat_template_kwargs', 'LMD-320': 'response_format'}
"""Fields that an error is about, whatever its parameters."""


def fault_of(error: BaseException) -> Fault:
    """How ``error`` is answered."""
    if isinstance(error, LmdeployError):
        known = FAULTS.get(error.code)
        if known is not None:
            return known
        if isinstance(error, (RequestError, TemplateError)):
            return INVALID
        if isinstance(error, (EngineDead, LoadError, ConfigError)):
            return UNAVAILABLE
    return INTERNAL


class ErrorDetail(msgspec.Struct):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str
    lmdeploy_code: str


class ErrorBody(msgspec.Struct):
    """An error's body: OpenAI's under ``error``, LMDeploy's beside it (its ``code`` is the HTTP status)."""

    error: ErrorDetail
    message: str
    type: str
    code: int
    param: str | None
    object: str = 'error'
    detail: dict[str, ErrorDetail] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, ready to be sent."""

    status: int
    body: bytes
    code: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


def describe(error: BaseException, request_id: str) -> tuple[Fault, ErrorDetail]:
    """The fault of ``error`` and what a client is told of it."""
    fault = fault_of(error)
    shown = error
    if not isinstance(error, LmdeployError):
        shown = HttpError('LMD-521', request_id=request_id)
    elif fault.hidden:
        shown = (HttpError('LMD-519', reason='it failed', state=error.code) if fault is UNAVAILABLE
                 else HttpError('LMD-521', request_id=request_id))
    assert isinstance(shown, LmdeployError)
    param = None
    if isinstance(error, LmdeployError):
        param = error.params.get('param', error.params.get('field', FIELDS.get(error.code)))
    name = PARAMS.get(param, param) if isinstance(param, str) else None
    return fault, ErrorDetail(shown.text('en')[:2000], fault.type, name, fault.code, shown.code)


def failure(error: BaseException, request_id: str) -> Failure:
    """The response that tells a client of ``error``."""
    fault, detail = describe(error, request_id)
    headers: list[tuple[bytes, bytes]] = []
    wait = error.params.get('retry_after') if isinstance(error, LmdeployError) else None
    if isinstance(wait, (int, float)):
        headers.append((b'retry-after', str(max(1, round(wait))).encode()))
    elif fault.status == 503:
        headers.append((b'retry-after', b'5'))
    if fault.status == 401:
        headers.append((b'www-authenticate', b'Bearer'))
    elif fault.status == 405 and isinstance(error, LmdeployError):
        headers.append((b'allow', str(error.params.get('allowed', '')).encode()))
    return Failure(fault.status, body(fault, detail), fault.code, tuple(headers))


def body(fault: Fault, detail: ErrorDetail) -> bytes:
    """Both shapes of an error; that of a 401 also has LMDeploy's ``detail``."""
    flat = ErrorBody(detail, detail.message, detail.type, fault.status, detail.param)
    if fault.status == 401:
        flat.detail = {'error': detail}
    return msgspec.json.encode(flat)
