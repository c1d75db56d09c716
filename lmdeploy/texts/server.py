"""Error texts: the server."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-501': {
        'en': 'port {port} of {host} is in use{owner}. Stop that program, or choose another port with --server-port.',
        'zh': '{host} 的端口 {port} 已被占用{owner}。请停止该程序,或用 --server-port 选择其他端口。',
    },
    'LMD-502': {
        'en': 'the server cannot listen on {host}, port {port}: {reason}. Choose an address of this machine with '
              '--server-name, and a port that you may use.',
        'zh': '服务器无法监听 {host} 的端口 {port}:{reason}。请用 --server-name 指定本机地址,并选择有权使用的端口。',
    },
    'LMD-503': {
        'en': 'the TLS files are not usable: {reason}. With --ssl, SSL_KEYFILE and SSL_CERTFILE name a private key and '
              'its certificate in PEM format.',
        'zh': 'TLS 文件不可用:{reason}。使用 --ssl 时,SSL_KEYFILE 与 SSL_CERTFILE 须指向 PEM 格式的私钥及其证书。',
    },
    'LMD-504': {
        'en': 'Please request with valid api key! Send it as "Authorization: Bearer KEY" or "x-api-key: KEY".',
        'zh': '请使用有效的 API key 发起请求!以 "Authorization: Bearer KEY" 或 "x-api-key: KEY" 的形式发送。',
    },
    'LMD-505': {
        'en': 'this is an administrative route. It needs an admin key (--admin-api-keys), or on a loopback address a '
              'server that was started with --enable-admin.',
        'zh': '这是管理接口,需要管理员密钥(--admin-api-keys);在回环地址上,也可在启动服务时加 --enable-admin。',
    },
    'LMD-506': {
        'en': 'there is nothing at this path. The routes of this server are listed at /docs.',
        'zh': '此路径不存在。服务器的接口列表见 /docs。',
    },
    'LMD-507': {
        'en': 'this path does not answer {method}. Use {allowed}.',
        'zh': '此路径不支持 {method}。请使用 {allowed}。',
    },
    'LMD-508': {
        'en': 'the body must be JSON: send it with the header "Content-Type: application/json".',
        'zh': '请求体必须是 JSON:请使用请求头 "Content-Type: application/json"。',
    },
    'LMD-509': {
        'en': 'the body is larger than {most} bytes. Send less.',
        'zh': '请求体超过 {most} 字节。请减少内容。',
    },
    'LMD-510': {
        'en': 'the header fields are too many or too large. At most {count} fields and {most} bytes are read.',
        'zh': '请求头过多或过大。最多读取 {count} 个字段、{most} 字节。',
    },
    'LMD-511': {
        'en': 'the body is not usable JSON: {reason}.',
        'zh': '请求体不是可用的 JSON:{reason}。',
    },
    'LMD-512': {
        'en': 'the request is not valid: {param}: {reason}.',
        'zh': '请求无效:{param}:{reason}。',
    },
    'LMD-513': {
        'en': '{param} is not supported: {reason}. Leave it out.',
        'zh': '不支持 {param}:{reason}。请省略它。',
    },
    'LMD-514': {
        'en': 'The model `{model}` does not exist. This server has: {served}.',
        'zh': '模型 `{model}` 不存在。此服务器提供:{served}。',
    },
    'LMD-515': {
        'en': 'the server is busy: {waiting} requests are waiting, and the queue holds {most}. Try again later.',
        'zh': '服务器繁忙:已有 {waiting} 个请求在等待,队列容量为 {most}。请稍后重试。',
    },
    'LMD-516': {
        'en': 'this key has reached its limit of {most} {what}. Wait, or ask the operator for more.',
        'zh': '此密钥已达到上限:{most} {what}。请稍候,或向管理员申请提高上限。',
    },
    'LMD-517': {
        'en': 'the request was not answered within {seconds:g} seconds and was given up. Ask for fewer tokens, or allow '
              'more time (--request-timeout).',
        'zh': '请求未能在 {seconds:g} 秒内完成,已放弃。请减少生成的 token 数,或延长时限(--request-timeout)。',
    },
    'LMD-518': {
        'en': 'the model is still loading. Try again soon; /health tells when it is ready.',
        'zh': '模型仍在加载。请稍后重试;/health 会告知何时就绪。',
    },
    'LMD-519': {
        'en': 'the engine is not available: {reason} ({state}). /health tells its state.',
        'zh': '引擎不可用:{reason}({state})。可通过 /health 查看状态。',
    },
    'LMD-520': {
        'en': 'the server is shutting down and takes no new requests.',
        'zh': '服务器正在关闭,不再接受新请求。',
    },
    'LMD-521': {
        'en': 'the server failed; its log says why, under request {request_id}.',
        'zh': '服务器出错;原因见服务器日志中的请求 {request_id}。',
    },
    'LMD-522': {
        'en': 'the Host header {host!r} is not an address of this machine, and the server listens on a loopback address '
              'only. Use http://127.0.0.1, or start it with another --server-name.',
        'zh': 'Host 请求头 {host!r} 不是本机回环地址,而服务器只监听回环地址。请使用 http://127.0.0.1,或用其他 '
              '--server-name 启动。',
    },
    'LMD-523': {
        'en': 'the stream was read too slowly ({reason}) and was given up.',
        'zh': '流的读取过慢({reason}),已放弃。',
    },
    'LMD-524': {
        'en': 'session {session_id} has a request that is running. Wait for it, or use another session_id.',
        'zh': '会话 {session_id} 有正在运行的请求。请等待其结束,或使用其他 session_id。',
    },
    'LMD-525': {
        'en': 'no running request of this key has that id.',
        'zh': '此密钥没有该 id 的正在运行的请求。',
    },
    'LMD-526': {
        'en': 'the body did not arrive within {seconds} seconds.',
        'zh': '请求体未能在 {seconds} 秒内到达。',
    },
    'LMD-527': {
        'en': 'option {option} cannot be {value!r}: {reason}.',
        'zh': '选项 {option} 不能为 {value!r}:{reason}。',
    },
    'LMD-528': {
        'en': 'the file {path} cannot be used for {option}: {reason}.',
        'zh': '文件 {path} 不能用于 {option}:{reason}。',
    },
    'LMD-530': {
        'en': 'the client went away before the answer was complete.',
        'zh': '客户端在回答完成前已断开。',
    },
    'LMD-531': {
        'en': 'the server has {most} connections open, and takes no more. Try again soon.',
        'zh': '服务器已有 {most} 个连接,不再接受更多。请稍后重试。',
    },
    'LMD-532': {
        'en': 'this address has {most} connections open, and no more are taken from it. Use fewer at a time, or ask the '
              'operator for more (--limit address_connections=N).',
        'zh': '此地址已有 {most} 个连接,不再接受更多。请减少并发连接,或向管理员申请提高上限(--limit address_connections=N)。',
    },
    'LMD-533': {
        'en': 'more than {most} wrong API keys came from this address within a minute. Check the key, and wait: a valid '
              'key is answered at any time.',
        'zh': '此地址一分钟内发送了超过 {most} 个错误的 API 密钥。请检查密钥后再试;有效密钥随时可用。',
    },
    'LMD-534': {
        'en': 'no response of this key has the id {response_id!r}: it was not stored, was deleted, or was forgotten since '
              'the server was started. Send the whole conversation as input.',
        'zh': '此密钥没有 id 为 {response_id!r} 的响应:未曾存储、已被删除,或自服务器启动后已被遗忘。请把完整对话作为 input 发送。',
    },
}
