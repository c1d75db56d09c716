"""Error texts: a model's config.json."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-110': {
        'en': 'the model is a {architecture}, which this version does not run. It runs: {known}.',
        'zh': '该模型的架构为 {architecture}，此版本不支持。支持的架构：{known}。',
    },
    'LMD-111': {
        'en': "config.json asks for the rope type '{rope_type}' in {field}, which this version does not know. "
              'It knows: {known}.',
        'zh': "config.json 的 {field} 要求 rope 类型 '{rope_type}'，此版本不支持。支持的类型：{known}。",
    },
    'LMD-112': {
        'en': 'config.json has no usable {field}: it must be there and be {wanted}. Fetch the model again, or ask its '
              'authors.',
        'zh': 'config.json 缺少 {field}：该字段必须存在，且应为{wanted}。请重新获取模型，或联系模型作者。',
    },
    'LMD-113': {
        'en': 'config.json has {field} = {value}, but it must be {wanted}. Fetch the model again, or ask its authors.',
        'zh': 'config.json 中 {field} = {value}，但应为{wanted}。请重新获取模型，或联系模型作者。',
    },
    'LMD-114': {
        'en': 'config.json contradicts itself: {reason}. Fetch the model again, or ask its authors.',
        'zh': 'config.json 自相矛盾：{reason}。请重新获取模型，或联系模型作者。',
    },
    'LMD-115': {
        'en': 'config.json asks for {field} = {value}, which this version does not support. It supports: {known}.',
        'zh': 'config.json 要求 {field} = {value}，此版本不支持。支持：{known}。',
    },
    'LMD-116': {
        'en': "the weights are quantised by '{method}', which this version does not read. It reads: {known}. Take a "
              'model that is quantised by one of these, or not at all, or a GGUF file of it.',
        'zh': "该模型权重采用 '{method}' 量化，此版本无法读取。支持：{known}。请使用以上方式量化的模型、未量化的模型，或其 GGUF 文件。",
    },
    'LMD-117': {
        'en': 'the model configuration is a {given}, but must be an object of named fields.',
        'zh': '模型配置的类型为 {given}，但应为由命名字段组成的对象。',
    },
    'LMD-118': {
        'en': "no kernel multiplies weights of scheme '{scheme}' on {device}: {reasons}.",
        'zh': "没有内核能在 {device} 上计算 '{scheme}' 格式的权重：{reasons}。",
    },
    'LMD-119': {
        'en': '{model} makes vectors of texts and writes none. Serve it with lmdeploy serve api_server and ask '
              '/v1/embeddings, or choose a chat model.',
        'zh': '{model} 只生成文本向量，不能生成文本。请用 lmdeploy serve api_server 部署并调用 /v1/embeddings，或改用对话模型。',
    },
}
