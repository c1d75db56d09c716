"""Error texts: clients of the server, and servers that a program starts."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-580': {
        'en': '{url} cannot be reached ({reason}). Is the server running there? Start one with lmdeploy serve '
              'api_server MODEL.',
        'zh': '无法连接 {url}（{reason}）。服务是否已在该地址运行？可用 lmdeploy serve api_server 模型 启动。',
    },
    'LMD-581': {
        'en': '{url!r} is not the address of a server. Write it as http://HOST:PORT.',
        'zh': '{url!r} 不是有效的服务地址。请写成 http://主机:端口。',
    },
    'LMD-582': {
        'en': 'the connection to {url} ended before the answer was complete ({reason}). The log of the server may say '
              'why.',
        'zh': '与 {url} 的连接在回答完成前已断开（{reason}）。原因可能见服务端日志。',
    },
    'LMD-583': {
        'en': '{url} does not answer as a server of models does ({reason}). Check the address.',
        'zh': '{url} 的应答不像模型服务（{reason}）。请检查地址。',
    },
    'LMD-584': {
        'en': 'the server ended with exit status {status} before it was ready. What it printed on stderr says why.',
        'zh': '服务在就绪前已退出，退出码 {status}。原因见其 stderr 输出。',
    },
    'LMD-585': {
        'en': 'field {field} of {config} has no option of the server, and is not its default. Leave it out.',
        'zh': '{config} 的字段 {field} 没有对应的服务选项，且不是默认值。请省略它。',
    },
    'LMD-586': {
        'en': 'an API key cannot contain a comma or a line end here. Choose another one.',
        'zh': '此处的 API key 不能包含逗号或换行符。请另选一个。',
    },
}
