// What all parts of the page share: its texts in two languages, the making of nodes, storage, the clipboard.

export const TEXTS = {
  en: {
    name: 'English', skip: 'Skip to the question', model: 'Model', tools: 'Tools', new: 'New conversation',
    code: 'As code',
    language: '切换为中文', theme: { auto: 'Colours: as the system', light: 'Colours: light', dark: 'Colours: dark' },
    settings: 'Settings', close: 'Close', conversation: 'Conversation', toEnd: 'To the end', question: 'Your question',
    placeholder: 'Ask anything', hint: 'Enter sends, Shift+Enter begins a new line. Answers can be wrong.',
    send: 'Send',
    stop: 'Stop', welcome: 'How can I help?',
    welcomeText: 'The model runs on this server. What you write goes there and nowhere else.',
    examples: ['Explain what a KV cache is, in three sentences', 'Write a Python function that reverses a linked list',
      'Translate into Chinese: knowledge is power'],
    system: 'System prompt', systemHint: 'How the model should behave', temperature: 'Temperature',
    temperatureHelp: '0 always takes the most probable token', topP: 'Top-p',
    topPHelp: 'Of the most probable tokens, those that make up this share', maxTokens: 'Max tokens',
    unlimited: 'no limit',
    seed: 'Seed', random: 'random', logprobs: 'Token probabilities',
    logprobsHelp: 'Point at a word to see what else was likely; on a keyboard, go to an answer and use the arrow keys',
    heat: 'Mark uncertain tokens', heatHelp: 'The less probable, the warmer', reset: 'Reset', changeKey: 'API key…',
    keyTitle: 'API key', keyText: 'It is sent to this server only, and forgotten when you close this tab.', key: 'Key',
    cancel: 'Cancel', useKey: 'Continue', keyWrong: 'The server does not accept this key.',
    codeTitle: 'This request as code',
    codeText: 'The conversation, what you are typing, and the settings. Put your own key in its place.',
    codeKind: 'Kind of code', copy: 'Copy', copied: 'Copied', edit: 'Edit', again: 'Again', you: 'You',
    answer: 'Answer',
    thinking: 'Thinking…', thoughts: 'Thoughts', thought: 'Thought for {0} s', first: 'first token {0} s', speed: '{0} tokens/s',
    tokens: '{0} tokens',
    stopped: 'stopped', length: 'ended at the token limit', aborted: 'ended by the server',
    empty: 'The answer is empty.',
    done: 'The answer is complete.', ready: 'Ready', loading: 'Loading the model', failed: 'Not available',
    unreachable: 'Server not reachable', chosen: 'token', sure: 'probability', retry: 'Try again',
    errors: {
      network: 'The server cannot be reached', broken: 'The connection broke before the answer was complete',
      401: 'The server wants an API key', 403: 'This is not allowed', 404: 'The server does not have this model',
      413: 'The conversation is too large', 429: 'Too many requests; wait a moment',
      503: 'The server cannot answer now',
      504: 'The answer took too long', context_length_exceeded: 'The conversation no longer fits into the context',
      model_loading: 'The model is still loading', other: 'The request failed',
      invalid: 'The server did not accept the request',
    },
  },
  zh: {
    name: '中文', skip: '跳到输入框', model: '模型', tools: '工具', new: '新对话', code: '查看代码',
    language: 'Switch to English',
    theme: { auto: '外观：跟随系统', light: '外观：浅色', dark: '外观：深色' }, settings: '设置', close: '关闭',
    conversation: '对话',
    toEnd: '回到底部', question: '你的问题', placeholder: '输入你的问题',
    hint: 'Enter 发送，Shift+Enter 换行。回答可能有误，请自行核实。',
    send: '发送', stop: '停止', welcome: '有什么可以帮你？',
    welcomeText: '模型运行在此服务器上，你输入的内容只会发送到这里。',
    examples: ['用三句话解释什么是 KV 缓存', '写一个反转链表的 Python 函数', '把这句话译成英文：知识就是力量'],
    system: '系统提示词', systemHint: '希望模型如何表现', temperature: '温度',
    temperatureHelp: '0 表示总是选取概率最高的 token',
    topP: 'Top-p', topPHelp: '只在累计概率达到此值的 token 中采样', maxTokens: '最大 token 数', unlimited: '不限',
    seed: '随机种子',
    random: '随机', logprobs: '显示 token 概率', logprobsHelp: '指向某个词，查看其他候选；键盘：选中回答后按方向键',
    heat: '标出不确定的 token',
    heatHelp: '概率越低，颜色越暖', reset: '恢复默认', changeKey: 'API key…', keyTitle: 'API key',
    keyText: '只发送给此服务器，关闭标签页后即清除。', key: '密钥', cancel: '取消', useKey: '继续',
    keyWrong: '服务器不接受此密钥。',
    codeTitle: '用代码发送此请求', codeText: '包含当前对话、正在输入的内容与设置。请自行填入密钥。',
    codeKind: '代码类型', copy: '复制',
    copied: '已复制', edit: '编辑', again: '重新生成', you: '你', answer: '回答', thinking: '思考中…', thoughts: '思考过程',
    thought: '思考了 {0} 秒',
    first: '首 token {0} 秒', speed: '{0} token/秒', tokens: '{0} 个 token', stopped: '已停止',
    length: '达到 token 上限',
    aborted: '被服务器终止', empty: '回答为空。', done: '回答完成。', ready: '就绪', loading: '正在加载模型',
    failed: '不可用',
    unreachable: '无法连接服务器', chosen: 'token', sure: '概率', retry: '重试',
    errors: {
      network: '无法连接服务器', broken: '回答未完成，连接已中断', 401: '服务器需要 API key', 403: '没有权限',
      404: '服务器没有此模型',
      413: '对话内容过大', 429: '请求过多，请稍候', 503: '服务器暂时无法回答', 504: '回答超时',
      context_length_exceeded: '对话已超出上下文长度', model_loading: '模型仍在加载', other: '请求失败',
      invalid: '服务器不接受此请求',
    },
  },
};

export const $ = (id) => document.getElementById(id);

/** Values that outlive a reload; a browser that refuses storage only forgets. */
export function store(area, name, value) {
  try {
    if (value === undefined) return JSON.parse(window[area].getItem(`lmdeploy.${name}`));
    window[area].setItem(`lmdeploy.${name}`, JSON.stringify(value));
  } catch { /* private windows, full storage */ }
  return null;
}

let language = store('localStorage', 'language') ?? (navigator.language.toLowerCase().startsWith('zh') ? 'zh' : 'en');

/** The language of the page, 'en' or 'zh'; given one, it becomes that. */
export function speaks(other) {
  if (other) {
    language = other;
    store('localStorage', 'language', other);
  }
  return language;
}

/** A text of the page; {0} and {1} are the values. */
export function t(name, ...values) {
  const found = name.split('.').reduce((texts, key) => texts?.[key], TEXTS[language]);
  return typeof found === 'string' ? found.replace(/\{(\d)\}/g, (_, i) => values[i]) : found;
}

/** The only way nodes are made: attributes are set, texts are texts. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A node that follows the language. */
export function word(tag, name, attributes = {}) {
  return make(tag, { ...attributes, 'data-t': name }, t(name));
}

/** Copy a text, and say so on the button. */
export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that came over plain HTTP from another machine has no clipboard
    const box = make('textarea', { class: 'unseen' });
    box.value = text;
    (button.closest('dialog') ?? document.body).append(box);
    box.select();
    document.execCommand('copy');
    box.remove();
  }
  button.textContent = t('copied');
  setTimeout(() => { button.textContent = t('copy'); }, 1500);
}
