"""Error texts: the proxy."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-560': {
        'en': 'this route needs the node key of the proxy. Send it as "Authorization: Bearer KEY"; a server takes it from '
              '--node-key or LMDEPLOY_NODE_KEY.',
        'zh': '此接口需要代理的节点密钥。以 "Authorization: Bearer KEY" 的形式发送；api_server 通过 --node-key 或 '
              'LMDEPLOY_NODE_KEY 获取该密钥。',
    },
    'LMD-561': {
        'en': '{url!r} cannot be a node: {reason}.',
        'zh': '{url!r} 不能作为节点：{reason}。',
    },
    'LMD-562': {
        'en': 'no node that serves `{model}` is there now. Try again soon.',
        'zh': '目前没有提供 `{model}` 的可用节点。请稍后重试。',
    },
    'LMD-563': {
        'en': 'the request names no model, and the nodes serve several: {served}. Name one as "model".',
        'zh': '请求未指定模型，而各节点提供多个模型：{served}。请用 "model" 指定其一。',
    },
    'LMD-564': {
        'en': 'no node has begun to answer; {tried} failed. Nothing was generated: send the request again.',
        'zh': '没有节点开始应答，{tried} 个节点失败。尚未生成任何内容：请重新发送请求。',
    },
    'LMD-565': {
        'en': 'the node broke off in the middle of its answer. What came so far is not complete: send the request again.',
        'zh': '节点在应答过程中断开。目前收到的内容不完整：请重新发送请求。',
    },
    'LMD-566': {
        'en': 'the node sent nothing for {seconds:g} seconds and was given up. Send the request again.',
        'zh': '节点在 {seconds:g} 秒内没有发送任何内容，已放弃。请重新发送请求。',
    },
    'LMD-567': {
        'en': 'the proxy knows {most} nodes already, which is the most. Remove some at /nodes/remove.',
        'zh': '代理已有 {most} 个节点，达到上限。请通过 /nodes/remove 移除一些。',
    },
    'LMD-568': {
        'en': 'no node has the address {url!r}. /nodes/status lists the nodes.',
        'zh': '没有地址为 {url!r} 的节点。节点列表见 /nodes/status。',
    },
    'LMD-569': {
        'en': 'the proxy {url} does not take this server as a node: {reason}. It is tried again.',
        'zh': '代理 {url} 未接受此服务器作为节点：{reason}。将继续重试。',
    },
    'LMD-570': {
        'en': 'the node {url} does not answer as a server of models does: {reason}.',
        'zh': '节点 {url} 的应答不像模型服务：{reason}。',
    },
    'LMD-571': {
        'en': 'the file of the nodes, {path}, cannot be used: {reason}. Delete it, or start with --disable-cache-status.',
        'zh': '节点记录文件 {path} 不可用：{reason}。请删除该文件，或用 --disable-cache-status 启动。',
    },
    'LMD-572': {
        'en': 'the proxy has no file descriptors left for connections to nodes. Try again soon; the limit is that of '
              '"ulimit -n".',
        'zh': '代理已没有可用于连接节点的文件描述符。请稍后重试；上限由 "ulimit -n" 决定。',
    },
}
