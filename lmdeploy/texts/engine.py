"""Error texts: the running engine."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-330': {
        'en': 'the request has {prompt_len} prompt tokens, but the engine takes 1 to {most}. '
              'Shorten the prompt, or raise session_len.',
        'zh': '请求的提示词有 {prompt_len} 个 token,而引擎接受 1 到 {most} 个。请缩短提示词,或增大 session_len。',
    },
    'LMD-331': {
        'en': 'the prompt contains token id {token}, which is not in the vocabulary of {vocab_size} tokens. '
              "Encode the text with this model's own tokenizer.",
        'zh': '提示词包含 token id {token},它不在大小为 {vocab_size} 的词表中。请使用该模型自己的分词器编码文本。',
    },
    'LMD-332': {
        'en': 'the prompt of {prompt_len} tokens needs {needed} KV cache blocks, but there are {num_blocks} in all. '
              'Shorten the prompt, or raise cache_max_entry_count.',
        'zh': '{prompt_len} 个 token 的提示词需要 {needed} 个 KV 缓存块,而总共只有 {num_blocks} 个。'
              '请缩短提示词,或增大 cache_max_entry_count。',
    },
    'LMD-333': {
        'en': 'a request with id {id!r} is running already. Give each request an id of its own.',
        'zh': 'id 为 {id!r} 的请求正在运行。请为每个请求使用不同的 id。',
    },
    'LMD-334': {
        'en': "the model's logits were not finite (NaN or infinite) after {position} tokens, so there is no next token. "
              'If it happens again, use dtype="bfloat16" or "float32", and check the weights.',
        'zh': '模型在 {position} 个 token 之后的 logits 不是有限数(NaN 或无穷),无法得到下一个 token。'
              '若再次出现,请使用 dtype="bfloat16" 或 "float32",并检查权重。',
    },
    'LMD-335': {
        'en': 'after {position} tokens the grammar, bad words and token bans allow no token at all. Loosen them.',
        'zh': '在 {position} 个 token 之后,语法、禁用词与禁用 token 的约束不允许任何 token。请放宽约束。',
    },
    'LMD-336': {
        'en': 'a logits processor of the request failed after {position} tokens: {cause}. Correct it.',
        'zh': '请求的 logits processor 在 {position} 个 token 之后出错:{cause}。请修正它。',
    },
    'LMD-337': {
        'en': 'the request failed inside the engine: {cause}. Other requests go on; the log has the details.',
        'zh': '请求在引擎内部失败:{cause}。其他请求不受影响;详情见日志。',
    },
    'LMD-338': {
        'en': 'the engine stopped because of an error: {cause}. Build the pipeline, or start the server, anew.',
        'zh': '引擎因错误而停止:{cause}。请重新创建 pipeline 或重新启动服务。',
    },
    'LMD-339': {
        'en': 'the engine is closed. Build a new pipeline, or start the server again.',
        'zh': '引擎已关闭。请新建 pipeline 或重新启动服务。',
    },
    'LMD-340': {
        'en': "the model's logits were not finite (NaN or infinite) for {count} different prompts in a row: the weights or the "
              'device are faulty. Use dtype="bfloat16" or "float32", and check the weights.',
        'zh': '连续 {count} 个不同提示词的 logits 都不是有限数(NaN 或无穷):权重或设备有问题。'
              '请使用 dtype="bfloat16" 或 "float32",并检查权重。',
    },
}
