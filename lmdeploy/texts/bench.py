"""Texts of the benchmarks."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-590': {
        'en': 'there are no shapes named {name!r}. Known: {known}. Any folder with a config.json works as well, with '
              '--load-format dummy.',
        'zh': '没有名为 {name!r} 的模型形状。可用：{known}。任何含有 config.json 的文件夹也可以，请加 --load-format dummy。',
    },
    'LMD-591': {
        'en': 'the requests of this workload are up to {longest} tokens long with their answers, but the model takes '
              '{most}. Shorten --input-len or --output-len, or raise --session-len.',
        'zh': '该负载的请求连同回答最长为 {longest} 个 token，而模型最多支持 {most} 个。'
              '请减小 --input-len 或 --output-len，或增大 --session-len。',
    },
    'LMD-592': {
        'en': 'none of {requests} requests was answered; the first error: {reason}',
        'zh': '{requests} 个请求均未得到回答；第一个错误：{reason}',
    },
}
