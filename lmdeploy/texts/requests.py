"""Error texts: requests, their prompts and their parameters."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-301': {
        'en': 'the prompt has {prompt_len} tokens, but the context length is {session_len} and one token at least must '
              'be generated ({parts}). Shorten it, or raise session_len (the model allows {model_len}).',
        'zh': '提示词共 {prompt_len} 个 token，而上下文长度为 {session_len}，且至少要生成一个 token（{parts}）。'
              '请缩短提示词，或增大 session_len（模型支持 {model_len}）。',
    },
    'LMD-302': {
        'en': 'the prompt is empty: there is no token to start from. Give some text or at least one token.',
        'zh': '提示词为空，没有可供起始的 token。请给出文本或至少一个 token。',
    },
    'LMD-303': {
        'en': 'a prompt must be a text, a list of messages or a list of token ids, but {given} was given.',
        'zh': '提示词应为文本、消息列表或 token id 列表，但收到的是 {given}。',
    },
    'LMD-304': {
        'en': 'a prompt with an image was given, but this model reads text only. Give the text alone, or load a '
              'vision-language model.',
        'zh': '提示词中包含图片，但该模型只支持文本。请只给出文本，或加载视觉语言模型。',
    },
    'LMD-305': {
        'en': 'token id {token} is not in the vocabulary of {vocab_size} tokens. Encode the text with this '
              "model's own tokenizer.",
        'zh': 'token id {token} 不在大小为 {vocab_size} 的词表中。请使用该模型自己的分词器编码文本。',
    },
    'LMD-306': {
        'en': '{prompts} prompts came with {configs} generation configs. Give one for all, or one for each.',
        'zh': '提示词有 {prompts} 个，而生成配置有 {configs} 个。请给出一个共用的配置，或每个提示词一个。',
    },
    'LMD-307': {
        'en': 'the prompt has {chars} characters, far more than {session_len} tokens of context can hold. Shorten it.',
        'zh': '提示词有 {chars} 个字符，远超 {session_len} 个 token 的上下文容量。请缩短提示词。',
    },
    'LMD-308': {
        'en': 'this model makes vectors of texts and writes none. Ask /v1/embeddings, or serve a chat model.',
        'zh': '该模型只生成文本向量，不能生成文本。请使用 /v1/embeddings，或改用对话模型。',
    },
    'LMD-309': {
        'en': 'the input has {prompt_len} tokens, but this model is served for texts of at most {session_len}. Cut it into '
              'pieces, or raise session_len (the model has positions for {model_len}).',
        'zh': '输入共 {prompt_len} 个 token，而此模型最多处理 {session_len} 个。请切分输入，或增大 session_len'
              '（模型的位置上限为 {model_len}）。',
    },
    'LMD-310': {
        'en': 'generation parameter {field}={value} is out of range. Give a number from {low} to {high}.',
        'zh': '生成参数 {field}={value} 超出范围。请给出 {low} 到 {high} 之间的数。',
    },
    'LMD-311': {
        'en': 'generation parameter {field} is not usable. Give {what}, at most {most} entries.',
        'zh': '生成参数 {field} 无效。要求：{what}，至多 {most} 项。',
    },
    'LMD-312': {
        'en': 'generation parameter {field}={value} is not possible. Choose one of: {choices}.',
        'zh': '生成参数 {field}={value} 无效。可选值：{choices}。',
    },
    'LMD-313': {
        'en': 'generation parameter {field} is not supported by this version. Leave it out.',
        'zh': '此版本不支持生成参数 {field}。请省略它。',
    },
    'LMD-314': {
        'en': 'gen_config is a {given}, but must be a GenerationConfig (or a list of them, one per prompt).',
        'zh': 'gen_config 是 {given}，但应为 GenerationConfig（或每个提示词一个的列表）。',
    },
    'LMD-315': {
        'en': 'the pipeline is closed. Build a new one with lmdeploy.pipeline(...).',
        'zh': '该 pipeline 已关闭。请用 lmdeploy.pipeline(...) 新建一个。',
    },
    'LMD-316': {
        'en': 'this pipeline was built in another process: it cannot be used after a fork. Build one in each process.',
        'zh': '该 pipeline 是在另一个进程中创建的，fork 之后不能使用。请在每个进程中各自创建。',
    },
    'LMD-317': {
        'en': '{method} is not supported by this version: it needs {what}.',
        'zh': '此版本不支持 {method}：需要 {what}。',
    },
    'LMD-318': {
        'en': 'session {session_id} is generating already. Wait for it, or stop it first.',
        'zh': '会话 {session_id} 正在生成。请等待其结束，或先停止它。',
    },
    'LMD-319': {
        'en': 'a turn of a conversation is one text or one list of messages and gets one answer, but {given} was '
              'given. Call the pipeline itself, pipe(...), for that.',
        'zh': '对话的一轮应为一段文本或一个消息列表，且只有一个回答，但收到的是 {given}。此类请求请直接调用 pipe(...)。',
    },
}
