"""Error texts: the running engine."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-330': {
        'en': 'the request has {prompt_len} prompt tokens, but the engine takes 1 to {most}. '
              'Shorten the prompt, or raise session_len.',
        'zh': '请求的提示词有 {prompt_len} 个 token，而引擎接受 1 到 {most} 个。请缩短提示词，或增大 session_len。',
    },
    'LMD-331': {
        'en': 'the prompt contains token id {token}, which is not in the vocabulary of {vocab_size} tokens. '
              "Encode the text with this model's own tokenizer.",
        'zh': '提示词包含 token id {token}，它不在大小为 {vocab_size} 的词表中。请使用该模型自己的分词器编码文本。',
    },
    'LMD-332': {
        'en': 'the prompt of {prompt_len} tokens needs {needed} KV cache blocks, but there are {num_blocks} in all. '
              'Shorten the prompt, or raise cache_max_entry_count.',
        'zh': '{prompt_len} 个 token 的提示词需要 {needed} 个 KV 缓存块，而总共只有 {num_blocks} 个。'
              '请缩短提示词，或增大 cache_max_entry_count。',
    },
    'LMD-333': {
        'en': 'a request with id {id!r} is running already. Give each request an id of its own.',
        'zh': 'id 为 {id!r} 的请求正在运行。请为每个请求使用不同的 id。',
    },
    'LMD-334': {
        'en': "the model's logits were not finite (NaN or infinite) after {position} tokens, so there is no next token. "
              'If it happens again, use dtype="bfloat16" or "float32", and check the weights.',
        'zh': '模型在 {position} 个 token 之后的 logits 不是有限数（NaN 或无穷），无法得到下一个 token。'
              '若再次出现，请使用 dtype="bfloat16" 或 "float32"，并检查权重。',
    },
    'LMD-335': {
        'en': 'after {position} tokens the grammar, bad words and token bans allow no token at all. Loosen them.',
        'zh': '在 {position} 个 token 之后，语法、禁用词与禁用 token 的约束不允许任何 token。请放宽约束。',
    },
    'LMD-336': {
        'en': 'a logits processor of the request failed after {position} tokens: {cause}. Correct it.',
        'zh': '请求的 logits processor 在 {position} 个 token 之后出错：{cause}。请修正它。',
    },
    'LMD-337': {
        'en': 'the request failed inside the engine: {cause}. Other requests go on; the log has the details.',
        'zh': '请求在引擎内部失败：{cause}。其他请求不受影响；详情见日志。',
    },
    'LMD-338': {
        'en': 'the engine stopped because of an error: {cause}. Build the pipeline, or start the server, anew.',
        'zh': '引擎因错误而停止：{cause}。请重新创建 pipeline 或重新启动服务。',
    },
    'LMD-339': {
        'en': 'the engine is closed. Build a new pipeline, or start the server again.',
        'zh': '引擎已关闭。请新建 pipeline 或重新启动服务。',
    },
    'LMD-340': {
        'en': "the model's logits were not finite (NaN or infinite) for {count} different prompts in a row: the weights or the "
              'device are faulty. Use dtype="bfloat16" or "float32", and check the weights.',
        'zh': '连续 {count} 个不同提示词的 logits 都不是有限数（NaN 或无穷）：权重或设备有问题。'
              '请使用 dtype="bfloat16" 或 "float32"，并检查权重。',
    },
    'LMD-341': {
        'en': "the request's {what} is Python code of this process, and the engine runs in another. "
              'Use bad_words, logit_bias or response_format, or serve it with lmdeploy.pipeline.',
        'zh': '请求的 {what} 是本进程中的 Python 代码，而引擎运行在另一个进程中。'
              '请使用 bad_words、logit_bias 或 response_format，或改用 lmdeploy.pipeline。',
    },
    'LMD-342': {
        'en': 'the engine is not ready yet ({stage}). Try again in a few seconds.',
        'zh': '引擎尚未就绪（{stage}）。请几秒后重试。',
    },
    'LMD-343': {
        'en': 'the engine process ended while the request was served: {cause}. Send the request again.',
        'zh': '引擎进程在处理请求时结束：{cause}。请重新发送请求。',
    },
    'LMD-344': {
        'en': 'the engine process ended ({cause}) and is started again. Try again in {seconds} s.',
        'zh': '引擎进程已结束（{cause}），正在重新启动。请在 {seconds} 秒后重试。',
    },
    'LMD-345': {
        'en': 'the engine process ended {crashes} times within {seconds:g} s and is not started again; the last time: '
              '{cause}. See the log, then start the server anew.',
        'zh': '引擎进程在 {seconds:g} 秒内结束了 {crashes} 次，不再重新启动；最后一次的原因：{cause}。'
              '请查看日志，然后重新启动服务。',
    },
    'LMD-346': {
        'en': 'the engine process ended {crashes} times while it served this request, which is therefore refused. '
              'Change the prompt or the parameters, and report it with the log.',
        'zh': '引擎进程在处理该请求时结束了 {crashes} 次，因此拒绝该请求。请修改提示词或参数，并附上日志报告此问题。',
    },
    'LMD-347': {
        'en': 'the engine sleeps and holds no model. Wake it up first (POST /wakeup).',
        'zh': '引擎处于休眠状态，未加载模型。请先唤醒它（POST /wakeup）。',
    },
    'LMD-348': {
        'en': 'the request cannot be sent to the engine: {reason}. Give its tokens and parameters as plain numbers.',
        'zh': '无法将请求发送到引擎：{reason}。请以普通数字给出 token 和参数。',
    },
    'LMD-349': {
        'en': 'the engine process ended while it loaded the model: {cause}. The log has the details; a process that was '
              'killed usually ran out of memory.',
        'zh': '引擎进程在加载模型时结束：{cause}。详情见日志；被系统终止的进程通常是内存不足。',
    },
    'LMD-362': {
        'en': 'rank {rank} of the model has failed, and with it all requests: {cause}',
        'zh': '模型的第 {rank} 个进程出错，所有请求随之失败：{cause}',
    },
    'LMD-363': {
        'en': "distributed_executor_backend='uni' is one process, but tp={tp} needs one for each device. Leave it out, or "
              "name 'mp'.",
        'zh': "distributed_executor_backend='uni' 只用一个进程，而 tp={tp} 需要每个设备一个进程。请不要设置，或设为 'mp'。",
    },
}
