// The chat page: one conversation with one model, over the server's own /v1 interface.
//
// Whatever a model or a server says is put into the page as text, never as HTML: every node is made by make(). The API
// key is kept for this tab only, and is in none of the texts that are made to be copied.

import { AnswerView } from './answer.js';
import { $, copyText, make, speaks, store, t, word } from './page.js';
import { curl, openaiPython } from './snippets.js';

const DEFAULTS = { temperature: 0.7, top_p: 1, max_tokens: '', seed: '', logprobs: true, heat: false };
const ALTERNATIVES = 5; // shown per token

const settings = { ...DEFAULTS, ...store('localStorage', 'settings') };
const state = {
  theme: store('localStorage', 'theme') ?? 'auto',
  key: store('sessionStorage', 'key') ?? '',
  turns: [], // {role, content, reasoning?} and for answers their view
  running: null, // the AbortController of the answer that is being written
  asked: false, // the server for its models
};

// ---- the server -----------------------------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(code, status = 0, message = '') {
    super(message);
    this.code = code;
    this.status = status;
  }

  get title() {
    const known = t('errors');
    const rest = this.status >= 400 && this.status < 500 ? known.invalid : known.other;
    return known[this.code] ?? known[this.status] ?? rest;
  }
}

function failure(body, status) {
  const error = body?.error ?? {};
  return new ServerError(String(error.code ?? ''), status, String(error.message ?? body?.message ?? ''));
}

/** A response of the server. Throws ServerError; a request that was stopped throws AbortError. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: 'no-store', credentials: 'omit' });
  } catch (error) {
    throw error.name === 'AbortError' ? error : new ServerError('network');
  }
  if (response.ok) return response;
  throw failure(await response.json().catch(() => null), response.status);
}

/** As call(), asking for a key as long as the server wants another one. */
async function callKeyed(path, options) {
  for (;;) {
    try {
      return await call(path, options);
    } catch (error) {
      if (error.status !== 401 || !(await askKey(Boolean(state.key)))) throw error;
    }
  }
}

/** The events of a stream, as values; returns when the server says that it is complete. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      throw error.name === 'AbortError' ? error : new ServerError('broken');
    }
    if (piece.done) throw new ServerError('broken');
    const lines = (rest + piece.value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      const value = JSON.parse(data);
      if (value.error) throw failure(value, 0);
      yield value;
    }
  }
}

async function watchServer() {
  let is = 'failed';
  let text = 'unreachable';
  try {
    const response = await fetch('health', { cache: 'no-store', credentials: 'omit' });
    const health = await response.json();
    is = response.ok ? 'ready' : health.status === 'initializing' ? 'loading' : 'failed';
    text = is;
  } catch { /* not reachable */ }
  $('state').dataset.is = is;
  if ($('state').lastElementChild.dataset.t !== text) {
    $('state').lastElementChild.dataset.t = text;
    $('state').lastElementChild.textContent = t(text);
  }
  if (is === 'ready' && !state.asked) {
    state.asked = true; // once by itself; after that, when a question is sent
    await loadModels().catch(() => {});
  }
  setTimeout(watchServer, is === 'ready' ? 15000 : 2000);
}

async function loadModels() {
  const models = (await (await callKeyed('v1/models')).json()).data;
  $('model').replaceChildren(...models.map(({ id }) => make('option', { value: id }, id.split('/').pop() || id)));
  $('model').title = $('model').value;
  const most = models[0]?.max_model_len;
  if (most) $('max_tokens').max = most;
}

let asking = null;

/** Ask for the key; false: the reader gave up. Requests that need it meanwhile wait for the same answer. */
function askKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $('key-dialog');
    $('key').value = '';
    $('key-problem').textContent = wrong ? t('keyWrong') : '';
    dialog.returnValue = '';
    dialog.addEventListener('close', () => {
      asking = null;
      const given = $('key').value.trim();
      $('key').value = '';
      if (dialog.returnValue !== 'use' || !given) return resolve(false);
      state.key = given;
      store('sessionStorage', 'key', given);
      return resolve(true);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// ---- the conversation -----------------------------------------------------------------------------------------------

/** The body of the request that answers the turns so far. */
function request(turns) {
  const system = $('system').value.trim();
  const body = {
    model: $('model').value,
    messages: [
      ...(system ? [{ role: 'system', content: system }] : []),
      ...turns.map(({ role, content }) => ({ role, content })),
    ],
    temperature: Number(settings.temperature),
    top_p: Number(settings.top_p),
  };
  if (settings.max_tokens) body.max_tokens = Number(settings.max_tokens);
  if (settings.seed !== '') body.seed = Number(settings.seed);
  return { ...body, stream: true };
}

function remember() {
  store('sessionStorage', 'turns', state.turns.map(({ role, content, reasoning }) => ({ role, content, reasoning })));
  $('welcome').hidden = state.turns.length > 0;
  const again = [...document.querySelectorAll('.again')];
  again.forEach((node, i) => { node.hidden = i < again.length - 1; });
}

function addQuestion(content) {
  const turn = { role: 'user', content };
  const edit = word('button', 'edit', { type: 'button', class: 'small', onclick: () => {
    if (state.running) return;
    cutFrom(turn);
    $('question').value = content;
    $('question').focus();
    grow();
  } });
  turn.node = make('article', { class: 'user', 'data-label': 'you', 'aria-label': t('you') },
    make('div', { class: 'text' }, content), make('div', { class: 'foot' }, edit));
  state.turns.push(turn);
  $('messages').append(turn.node);
}

function addAnswer() {
  const view = new AnswerView();
  const turn = { role: 'assistant', content: '', view, node: view.node };
  const copy = word('button', 'copy', { type: 'button', class: 'small', onclick: () => copyText(turn.content, copy) });
  const again = word('button', 'again', { type: 'button', class: 'small again', onclick: () => retry(turn) });
  view.actions.append(copy, again);
  state.turns.push(turn);
  $('messages').append(turn.node);
  return turn;
}

function cutFrom(turn) {
  for (const { node } of state.turns.splice(state.turns.indexOf(turn))) node.remove();
  remember();
}

function retry(turn) {
  if (state.running) return;
  cutFrom(turn);
  answer();
}

/** Let the model answer the turns so far. */
async function answer() {
  const turns = state.turns.filter(({ role, content }) => role === 'user' || content);
  const body = { ...request(turns), stream_options: { include_usage: true } };
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  const turn = addAnswer();
  const { view } = turn;
  const again = () => retry(turn);
  const clock = new Clock(view);
  turn.clock = clock;
  state.running = new AbortController();
  busy(true);
  follow(true);
  let due = 0;
  const draw = () => {
    due = 0;
    view.render();
    clock.show();
    follow();
  };
  try {
    if (!body.model) {
      await loadModels();
      body.model = $('model').value;
    }
    const response = await callKeyed('v1/chat/completions', {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
      signal: state.running.signal,
    });
    for await (const chunk of events(response)) {
      if (chunk.usage) clock.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const { content, reasoning_content: reasoning } = choice.delta;
      const entries = choice.logprobs?.content ?? [];
      if (content || reasoning || entries.length) clock.tick(entries.length || 1);
      if (reasoning) view.think(reasoning);
      if (content) {
        view.thoughtFor(clock.seconds);
        view.add(content, entries);
      }
      if (choice.finish_reason === 'length') clock.note = 'length';
      if (choice.finish_reason === 'abort') clock.note = 'aborted';
      due ||= requestAnimationFrame(draw);
    }
    $('announce').textContent = t('done');
  } catch (error) {
    if (error.name === 'AbortError') clock.note = 'stopped';
    else view.fail(error instanceof ServerError ? error : new ServerError('other', 0, String(error)), again);
  } finally {
    cancelAnimationFrame(due);
    state.running = null;
    view.thoughtFor(clock.seconds);
    Object.assign(turn, { content: view.content, reasoning: view.reasoning });
    draw();
    view.finish();
    clock.show();
    busy(false);
    remember();
    follow();
  }
}

/** Time to the first token, and tokens per second after it. */
class Clock {
  constructor(view) {
    this.view = view;
    this.begun = performance.now();
    this.tokens = 0;
    this.note = '';
  }

  tick(count) {
    this.last = performance.now();
    this.first ??= this.last;
    this.firstCount ??= count;
    this.tokens += count;
  }

  /** Since the first token. */
  get seconds() { return this.first ? (performance.now() - this.first) / 1000 : 0; }

  show() {
    const parts = [];
    if (this.first) {
      const rest = this.tokens - this.firstCount;
      const span = (this.last - this.first) / 1000;
      if (rest > 0 && span > 0) parts.push(make('span', { class: 'speed' }, t('speed', (rest / span).toFixed(1))));
      parts.push(make('span', { class: 'first' }, t('first', ((this.first - this.begun) / 1000).toFixed(2))));
      parts.push(make('span', { class: 'count' }, t('tokens', this.tokens)));
    }
    if (this.note) parts.push(word('span', this.note, { class: 'note' }));
    this.view.figures.replaceChildren(...parts);
  }
}

function busy(now) {
  $('send').hidden = now;
  $('stop').hidden = !now;
  $('messages').setAttribute('aria-busy', now);
  grow();
}

function ask(text) {
  if (!text.trim() || state.running) return;
  addQuestion(text.trim());
  $('question').value = '';
  remember();
  answer();
}

let pinned = true; // to the end of the conversation, until the reader scrolls up

function follow(force = false) {
  const box = $('scroller');
  if (force) pinned = true;
  if (pinned) box.scrollTop = box.scrollHeight;
}

function grow() {
  const box = $('question');
  box.style.height = 'auto';
  box.style.height = `${box.scrollHeight}px`;
  box.style.overflowY = box.scrollHeight > box.clientHeight + 1 ? 'auto' : 'hidden';
  $('send').disabled = !box.value.trim();
}

// ---- as code --------------------------------------------------------------------------------------------------------

/** The request that the next answer would come from, or if nothing is typed, the one that the last answer came from. */
function currentRequest() {
  const pending = $('question').value.trim();
  const turns = state.turns.filter(({ role, content }) => role === 'user' || content);
  if (pending) turns.push({ role: 'user', content: pending });
  else if (turns[turns.length - 1]?.role === 'assistant') turns.pop();
  return request(turns);
}

function showCode() {
  const base = new URL('v1', document.baseURI).href;
  const inPython = document.querySelector('[name=kind]:checked').value === 'python';
  $('code').textContent = inPython ? openaiPython(base, currentRequest()) : curl(base, currentRequest(), state.key !== '');
}

// ---- language, colours, settings --------------------------------------------------------------------------------------

function speak() {
  document.documentElement.lang = speaks() === 'zh' ? 'zh-CN' : 'en';
  for (const node of document.querySelectorAll('[data-t]')) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll('[data-placeholder]')) node.placeholder = t(node.dataset.placeholder);
  for (const node of document.querySelectorAll('[data-label]')) {
    node.setAttribute('aria-label', t(node.dataset.label));
    if (node.matches('button')) node.title = t(node.dataset.label);
  }
  const example = (text) => make('button', { type: 'button', onclick: () => ask(text) }, text);
  $('examples').replaceChildren(...t('examples').map(example));
  for (const { clock } of state.turns) clock?.show();
  paint();
}

const darkSystem = matchMedia('(prefers-color-scheme: dark)');

function paint() {
  const dark = state.theme === 'dark' || (state.theme === 'auto' && darkSystem.matches);
  document.documentElement.toggleAttribute('data-dark', dark);
  $('theme').title = t('theme')[state.theme];
  $('theme').setAttribute('aria-label', t('theme')[state.theme]);
}

const FIELDS = ['temperature', 'top_p', 'max_tokens', 'seed', 'logprobs', 'heat'];

function showSettings() {
  for (const name of FIELDS) {
    const field = $(name);
    if (field.type === 'checkbox') field.checked = settings[name];
    else field.value = settings[name];
    const output = field.parentElement.querySelector('output');
    if (output) output.textContent = Number(settings[name]).toFixed(2);
  }
  document.documentElement.classList.toggle('heat', settings.heat);
}

function openSettings(open) {
  $('settings').hidden = !open;
  $('show-settings').setAttribute('aria-expanded', open);
  store('localStorage', 'open', open && innerWidth > 760);
}

function listen() {
  $('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    ask($('question').value);
  });
  $('question').addEventListener('input', grow);
  $('question').addEventListener('keydown', (event) => {
    const typing = event.isComposing || event.keyCode === 229; // Enter accepts what an input method offers
    if (event.key !== 'Enter' || event.shiftKey || typing || matchMedia('(pointer: coarse)').matches) return;
    event.preventDefault();
    ask(event.target.value);
  });
  $('stop').addEventListener('click', () => {
    state.running?.abort();
    $('question').focus();
  });
  $('new').addEventListener('click', () => {
    state.running?.abort();
    state.turns = [];
    $('messages').replaceChildren();
    remember();
    $('question').focus();
  });
  $('scroller').addEventListener('scroll', () => {
    const box = $('scroller');
    pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    $('to-end').hidden = pinned;
    $('tip').hidden = true;
  });
  $('to-end').addEventListener('click', () => follow(true));
  $('model').addEventListener('change', () => { $('model').title = $('model').value; });
  $('language').addEventListener('click', () => {
    speaks(speaks() === 'zh' ? 'en' : 'zh');
    speak();
  });
  $('theme').addEventListener('click', () => {
    state.theme = { auto: 'light', light: 'dark', dark: 'auto' }[state.theme];
    store('localStorage', 'theme', state.theme);
    paint();
  });
  darkSystem.addEventListener('change', paint);
  for (const name of FIELDS) {
    $(name).addEventListener('input', ({ target }) => {
      if (!target.checkValidity()) return;
      settings[name] = target.type === 'checkbox' ? target.checked : target.value;
      store('localStorage', 'settings', settings);
      showSettings();
    });
  }
  $('system').addEventListener('input', () => store('sessionStorage', 'system', $('system').value));
  $('reset').addEventListener('click', () => {
    Object.assign(settings, DEFAULTS);
    store('localStorage', 'settings', settings);
    $('system').value = '';
    store('sessionStorage', 'system', '');
    showSettings();
  });
  $('show-settings').addEventListener('click', () => {
    openSettings($('settings').hidden);
    if (!$('settings').hidden) $('system').focus();
  });
  $('hide-settings').addEventListener('click', () => {
    openSettings(false);
    $('show-settings').focus();
  });
  $('settings').addEventListener('keydown', (event) => {
    if (event.key === 'Escape') $('hide-settings').click();
  });
  $('change-key').addEventListener('click', () => askKey(false));
  $('key-dialog').querySelector('form').addEventListener('submit', (event) => {
    event.preventDefault();
    $('key-dialog').close('use');
  });
  $('key-cancel').addEventListener('click', () => $('key-dialog').close());
  $('show-code').addEventListener('click', () => {
    showCode();
    $('code-dialog').showModal();
  });
  for (const radio of document.querySelectorAll('[name=kind]')) radio.addEventListener('change', showCode);
  $('code-copy').addEventListener('click', () => copyText($('code').textContent, $('code-copy')));
  $('code-close').addEventListener('click', () => $('code-dialog').close());
}

/** The conversation of before a reload of this tab. */
function restore() {
  $('system').value = store('sessionStorage', 'system') ?? '';
  for (const { role, content, reasoning } of store('sessionStorage', 'turns') ?? []) {
    if (role === 'user') {
      addQuestion(content);
      continue;
    }
    if (!content && !reasoning) continue; // it failed
    const turn = addAnswer();
    if (reasoning) turn.view.think(reasoning, 'thoughts');
    Object.assign(turn, { content, reasoning });
    turn.view.content = content;
    turn.view.finish();
  }
  remember();
}

restore();
speak();
showSettings();
openSettings(Boolean(store('localStorage', 'open')) && innerWidth > 760);
listen();
follow(true);
watchServer();
