"""Error texts: the public engine options."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-220': {
        'en': 'backend_config is a {given}, but must be a TurbomindEngineConfig or a PytorchEngineConfig. '
              'Import one from lmdeploy, or leave it out.',
        'zh': 'backend_config 是 {given}，但应为 TurbomindEngineConfig 或 PytorchEngineConfig。请从 lmdeploy 导入其一，或省略该参数。',
    },
    'LMD-221': {
        'en': 'option {field}={value!r} is not possible. Choose one of: {choices}.',
        'zh': '选项 {field}={value!r} 无效。可选值：{choices}。',
    },
    'LMD-222': {
        'en': 'engine option {field}={value!r} is not possible. Give a whole number from {least} to {most}.',
        'zh': '引擎选项 {field}={value!r} 无效。请给出 {least} 到 {most} 之间的整数。',
    },
    'LMD-223': {
        'en': 'engine option {field}={value!r} is not possible. Give a share of the free memory between 0 and 1 '
              '(such as 0.8), or a whole number of KV cache blocks.',
        'zh': '引擎选项 {field}={value!r} 无效。请给出 0 到 1 之间的空闲内存比例（如 0.8），或 KV 缓存块的整数个数。',
    },
    'LMD-224': {
        'en': 'engine option {field}={value!r} is not possible: KV cache pages hold 64 tokens. '
              'Give a multiple of 64, up to 4096.',
        'zh': '引擎选项 {field}={value!r} 无效：KV 缓存每页 64 个 token。请给出 64 的倍数（至多 4096）。',
    },
    'LMD-225': {
        'en': 'engine option {field}={value!r} is not possible. Give 0.0 (off) or a factor from 1 to 1024.',
        'zh': '引擎选项 {field}={value!r} 无效。请给出 0.0（关闭）或 1 到 1024 之间的倍数。',
    },
    'LMD-226': {
        'en': 'tp={value} needs as many GPUs, but this machine has {devices}. Set tp to at most that.',
        'zh': 'tp={value} 需要同样多的 GPU，但本机有 {devices} 个。请把 tp 设为不超过该数的值。',
    },
    'LMD-227': {
        'en': 'engine option {field}={value!r} is not supported by this version. Leave it at {default!r}.',
        'zh': '此版本不支持引擎选项 {field}={value!r}。请保留默认值 {default!r}。',
    },
    'LMD-228': {
        'en': '{field} is a {given}, but must be {wanted}.',
        'zh': '{field} 的类型是 {given}，应为 {wanted}。',
    },
    'LMD-229': {
        'en': "model_format={value!r}, but the model's config.json says that its weights are {found!r}. Leave "
        'model_format out: it is detected.',
        'zh': 'model_format={value!r}，但模型的 config.json 表明其权重为 {found!r}。请不要设置 model_format：它会自动检测。',
    },
}
