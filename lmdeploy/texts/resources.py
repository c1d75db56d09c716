"""Error texts: memory and devices."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-201': {
        'en': 'one session of {session_len} tokens needs {needed} of KV cache, but only {share} of {left} may be used '
              '({free} free, less {weights} for weights and {workspace} for a step). Three ways out: session_len={fits} '
              'or less; cache_max_entry_count={blocks} (a whole number is a number of KV blocks, whatever the share); '
              'or free {missing} more memory.',
        'zh': '一个 {session_len} token 的会话需要 {needed} 的 KV 缓存，但只能使用 {left} 中的 {share}'
              '（空闲 {free}，其中权重占 {weights}，单步计算占 {workspace}）。三种办法：session_len={fits} 或更小；'
              'cache_max_entry_count={blocks}（整数表示 KV 块数，不受比例限制）；或再释放 {missing} 内存。',
    },
    'LMD-202': {
        'en': 'the model needs {needed} of memory in {dtype} ({weights} of weights, {workspace} for a step), but '
              '{free} are free. Take a smaller model, dtype="bfloat16" if it is not yet, a smaller max_batch_size, or '
              'close other programs.',
        'zh': '以 {dtype} 加载该模型需要 {needed} 内存（权重 {weights}，单步计算 {workspace}），但只有 {free} 空闲。'
              '请换用更小的模型、使用 dtype="bfloat16"（如尚未使用）、减小 max_batch_size，或关闭其他程序。',
    },
    'LMD-203': {
        'en': '{num_blocks} KV cache blocks need {needed}, but {left} are left after the weights. '
              'Give at most {fits}, or a share such as cache_max_entry_count=0.8.',
        'zh': '{num_blocks} 个 KV 缓存块需要 {needed}，但加载权重后只剩 {left}。'
              '请至多给出 {fits} 块，或使用比例（如 cache_max_entry_count=0.8）。',
    },
    'LMD-204': {
        'en': 'session_len={session_len} needs {needed} KV cache blocks, but {num_blocks} were asked for. '
              'Give {needed} blocks or more, or session_len={fits} or less.',
        'zh': 'session_len={session_len} 需要 {needed} 个 KV 缓存块，但只要求了 {num_blocks} 个。'
              '请给出至少 {needed} 块，或 session_len={fits} 及更小的值。',
    },
    'LMD-205': {
        'en': 'dtype={dtype} is not computed on a {device}. Choose one of: {choices}.',
        'zh': '{device} 上不支持 dtype={dtype}。可选值：{choices}。',
    },
    'LMD-206': {
        'en': 'device "{device}" was asked for, but this installation of torch ({torch}) finds none. '
              'Leave the device to "auto", or install the torch build for it.',
        'zh': '要求使用设备 "{device}"，但当前安装的 torch（{torch}）没有找到该设备。'
              '请将设备设为 "auto"，或安装对应的 torch 版本。',
    },
    'LMD-207': {
        'en': 'memory ran out, twice, in a step of this request ({cause}); the engine goes on. Send it again later, close '
              'other programs, or load the model with a smaller max_prefill_token_num, max_batch_size or '
              'cache_max_entry_count.',
        'zh': '在该请求的计算步中内存两次耗尽（{cause}）；引擎继续运行。请稍后重试、关闭其他程序，或以更小的 '
              'max_prefill_token_num、max_batch_size 或 cache_max_entry_count 重新加载模型。',
    },
    'LMD-208': {
        'en': 'one session of {session_len} tokens needs {needed} of KV cache, but {left} are left of {free} free memory '
              'after {weights} for weights and {workspace} for a step of {batch} rows. Three ways out: '
              'session_len={fits} or less; a smaller model or max_batch_size; or free {missing} more memory.',
        'zh': '一个 {session_len} token 的会话需要 {needed} 的 KV 缓存，但在 {free} 空闲内存中，扣除权重 {weights} 和 '
              '{batch} 行的单步计算 {workspace} 后只剩 {left}。三种办法：session_len={fits} 或更小；'
              '更小的模型或 max_batch_size；或再释放 {missing} 内存。',
    },
    'LMD-211': {
        'en': 'the kernels of {module}{origin} cannot be registered: {reason}. Repair or uninstall that package.',
        'zh': '无法注册 {module}{origin} 的内核：{reason}。请修复或卸载该软件包。',
    },
    'LMD-212': {
        'en': 'there is no op named {name!r}. Known: {known}.',
        'zh': '没有名为 {name!r} 的算子。可用：{known}。',
    },
    'LMD-210': {
        'en': 'the memory of {device} ran out while the engine started, at {stage} ({free} were free before). Close other '
              'programs that use it, or give a smaller max_prefill_token_num, max_batch_size, session_len or '
              'cache_max_entry_count.',
        'zh': '引擎启动时 {device} 的显存耗尽，阶段为 {stage}（启动前空闲 {free}）。请关闭占用该设备的其他程序，或减小 '
              'max_prefill_token_num、max_batch_size、session_len 或 cache_max_entry_count。',
    },
    'LMD-209': {
        'en': 'session_len={session_len} is more than the {most} tokens that the model has positions for. Give at most '
              'that, or leave it out.',
        'zh': 'session_len={session_len} 超过模型的位置上限 {most}。请设为不超过该值，或省略。',
    },
}
