// An answer on the page: its text with code, headings and emphasis, and in it the tokens with their probabilities.

import { $, copyText, make, t, word } from './page.js';

/** The blocks of a text: {kind: 'p' | 'h' | 'code', start, end, from, to, name}; from..to is what is shown. */
function blocks(text) {
  const found = [];
  let open = null;
  let at = 0;
  for (const line of text.split('\n')) {
    const end = at + line.length;
    const last = found[found.length - 1];
    const fence = /^ {0,3}(`{3,}|~{3,})\s*(\S*)/.exec(line);
    if (open) {
      if (fence && fence[1].startsWith(open.fence) && !fence[2]) open = null;
      else open.to = end;
      last.end = end;
    } else if (fence && !fence[2].includes('`')) {
      const from = Math.min(end + 1, text.length);
      open = { kind: 'code', start: at, end, from, to: from, name: fence[2], fence: fence[1] };
      found.push(open);
    } else if (/^#{1,6} /.test(line)) {
      found.push({ kind: 'h', start: at, end, from: at + line.indexOf(' ') + 1, to: end });
    } else if (line.trim()) {
      if (last?.kind === 'p' && last.end + 1 === at) last.end = last.to = end;
      else found.push({ kind: 'p', start: at, end, from: at, to: end });
    }
    at = end + 1;
  }
  return found;
}

const DOUBT = [-0.7, -1.6, -3, -Infinity]; // log-probabilities: one in two, five, twenty
const EMPHASIS = /(`+)([^`\n]+)\1(?!`)|\*\*([^*\n]+)\*\*/g;

/** The runs of a line of text: [element or null, from, to]; the marks themselves are left out. */
function* runs(text, from, to) {
  let at = from;
  for (const match of text.slice(from, to).matchAll(EMPHASIS)) {
    const start = from + match.index;
    const mark = match[1]?.length ?? 2;
    if (start > at) yield [null, at, start];
    yield [match[1] ? 'code' : 'strong', start + mark, start + match[0].length - mark];
    at = start + match[0].length;
  }
  if (at < to) yield [null, at, to];
}

/** One answer on the page, growing. Only its last block is made anew when text arrives. */
export class AnswerView {
  constructor() {
    this.content = '';
    this.reasoning = '';
    this.tokens = []; // {text, start, end, logprob, top}: start..end is its place in the content
    this.shown = [];
    this.text = make('div', { class: 'text waiting' });
    this.figures = make('div', { class: 'figures' });
    this.actions = make('div', { class: 'actions' });
    this.foot = make('div', { class: 'foot' }, this.actions, this.figures);
    const named = { 'data-label': 'answer', 'aria-label': t('answer') };
    this.node = make('article', { class: 'answer busy', ...named }, this.text, this.foot);
    this.text.addEventListener('pointerover', (event) => this.point(event.target.closest('.t')));
    this.text.addEventListener('pointerleave', () => this.point(null));
    this.text.addEventListener('blur', () => this.point(null));
    this.text.addEventListener('keydown', (event) => this.walk(event));
  }

  /** A piece of the answer, and the tokens that it is made of. */
  add(text, entries) {
    let start = this.content.length;
    this.content += text;
    const decoder = new TextDecoder();
    let pieces = entries.map(({ bytes }) => decoder.decode(new Uint8Array(bytes ?? []), { stream: true }));
    if (pieces.join('') !== text) pieces = entries.map((_, i) => (i === entries.length - 1 ? text : ''));
    entries.forEach(({ token, logprob, top_logprobs: top }, i) => {
      this.tokens.push({ text: token, start, end: start + pieces[i].length, logprob, top });
      start += pieces[i].length;
    });
  }

  /** A piece of the reasoning, under a title. */
  think(text, title = 'thinking') {
    if (!this.thought) {
      this.thoughtBody = make('div');
      this.thought = make('details', { class: 'thought' }, word('summary', title), this.thoughtBody);
      this.node.prepend(this.thought);
    }
    this.reasoning += text;
    this.thoughtBody.append(text);
  }

  thoughtFor(seconds) {
    const summary = this.thought?.firstElementChild;
    if (!summary?.dataset.t) return;
    delete summary.dataset.t;
    summary.textContent = t('thought', seconds.toFixed(1));
  }

  render() {
    const found = blocks(this.content);
    found.forEach((block, i) => {
      const key = `${block.kind} ${block.start} ${block.end}`;
      if (this.shown[i]?.key === key) return;
      const node = block.kind === 'code' ? this.codeBlock(block) : this.lines(block);
      if (this.shown[i]) this.shown[i].node.replaceWith(node);
      else this.text.append(node);
      this.shown[i] = { key, node };
    });
    for (const { node } of this.shown.splice(found.length)) node.remove();
    this.text.classList.toggle('waiting', !found.length && this.node.classList.contains('busy'));
    if (this.tokens.length && found.length) this.text.tabIndex = 0;
  }

  lines({ kind, from, to }) {
    const node = make(kind === 'h' ? 'h3' : 'p');
    for (const [tag, start, end] of runs(this.content, from, to)) {
      const pieces = this.pieces(start, end);
      if (tag) node.append(make(tag, {}, ...pieces));
      else node.append(...pieces);
    }
    return node;
  }

  codeBlock({ from, to, name }) {
    const onclick = () => copyText(this.content.slice(from, to), copy);
    const copy = word('button', 'copy', { type: 'button', class: 'small', onclick });
    return make('div', { class: 'block' },
      make('div', { class: 'title' }, make('span', {}, name ?? ''), copy),
      make('pre', { tabindex: '0' }, make('code', {}, ...this.pieces(from, to))));
  }

  /** The text from..to of the content, token by token where it is known. */
  pieces(from, to) {
    let low = 0;
    for (let high = this.tokens.length; low < high;) { // the first token that ends behind from
      const middle = (low + high) >> 1;
      if (this.tokens[middle].end > from) high = middle;
      else low = middle + 1;
    }
    const found = [];
    for (let at = from; at < to;) {
      const token = this.tokens[low];
      if (!token || token.start > at) { // text that came without a token
        const end = Math.min(to, token?.start ?? to);
        found.push(this.content.slice(at, end));
        at = end;
        continue;
      }
      const end = Math.min(to, token.end);
      const doubt = DOUBT.findIndex((least) => token.logprob > least);
      if (end > at) found.push(make('span', { class: `t d${doubt}`, 'data-i': low }, this.content.slice(at, end)));
      at = Math.max(at, end);
      low += 1;
    }
    return found;
  }

  /** Show the alternatives of a token's node. */
  point(node) {
    this.at?.classList.remove('at');
    this.at = node;
    if (!node) return void ($('tip').hidden = true);
    node.classList.add('at');
    return showTip(this.tokens[Number(node.dataset.i)], node);
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.target !== this.text || (!step && event.key !== 'Escape')) return;
    event.preventDefault();
    const all = [...this.text.querySelectorAll('.t')];
    const next = this.at ? all.indexOf(this.at) + step : step > 0 ? 0 : all.length - 1;
    this.point(step ? all[Math.min(Math.max(next, 0), all.length - 1)] : null);
    this.at?.scrollIntoView({ block: 'nearest' });
    if (this.at) $('announce').textContent = $('tip').innerText;
  }

  fail(error, retry) {
    this.node.append(make('div', { class: 'error', role: 'alert' },
      make('b', {}, error.title), ...(error.message ? [make('p', {}, error.message)] : []),
      word('button', 'retry', { type: 'button', class: 'plain', onclick: retry })));
  }

  finish() {
    this.node.classList.remove('busy');
    this.render();
    if (!this.content && !this.reasoning) this.figures.append(word('span', 'empty'));
  }
}

const visible = (text) => text.replace(/ /g, '␣').replace(/\n/g, '↵').replace(/\t/g, '⇥') || '∅';
const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return share >= 0.1 ? `${share.toFixed(1)} %` : '< 0.1 %';
};

function showTip(token, node) {
  const chosen = { token: token.text, logprob: token.logprob };
  const top = token.top.some((one) => one.token === token.text) ? token.top : [...token.top, chosen];
  const tip = $('tip');
  tip.replaceChildren(make('p', {}, word('span', 'chosen'), word('span', 'sure')), ...top.map((one) => {
    const bar = make('i', { 'aria-hidden': 'true' });
    bar.style.width = `${Math.exp(one.logprob) * 100}%`;
    return make('div', one.token === token.text ? { class: 'chosen' } : {},
      bar, make('span', {}, visible(one.token)), make('span', {}, percent(one.logprob)));
  }));
  tip.hidden = false;
  const [place] = node.getClientRects();
  const size = tip.getBoundingClientRect();
  const below = place.top < size.height + 14;
  tip.style.left = `${Math.max(8, Math.min(place.left - 12, document.documentElement.clientWidth - size.width - 8))}px`;
  tip.style.top = `${below ? place.bottom + 7 : place.top - size.height - 7}px`;
}
