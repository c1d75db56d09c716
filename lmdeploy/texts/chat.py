"""Error texts: chat templates and conversations."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-170': {
        'en': 'there is no chat template named {name!r}. Registered names: {names}. Choose one of them, or register '
              'your own with @MODELS.register_module(name=...).',
        'zh': '没有名为 {name!r} 的对话模板。已注册的名称：{names}。请选择其中之一，'
              '或用 @MODELS.register_module(name=...) 注册自己的模板。',
    },
    'LMD-171': {
        'en': 'the chat template description {source} cannot be used: {reason}. Give a JSON object with "model_name" '
              'and any of: {fields}.',
        'zh': '无法使用对话模板描述 {source}：{reason}。请给出一个 JSON 对象，包含 "model_name" 以及以下任意字段：{fields}。',
    },
    'LMD-172': {
        'en': 'the chat template of {source} does not compile (line {line}): {reason}. Correct it, or choose a named '
              'template with chat_template_config.',
        'zh': '{source} 的对话模板无法编译（第 {line} 行）：{reason}。请修正模板，或通过 chat_template_config 选择内置模板。',
    },
    'LMD-173': {
        'en': 'the chat template of {source} was stopped by the sandbox (line {line}): {reason}. Templates may read '
              'their input only; do not trust this file.',
        'zh': '{source} 的对话模板被沙箱阻止（第 {line} 行）：{reason}。模板只允许读取其输入；请勿信任该文件。',
    },
    'LMD-174': {
        'en': 'rendering the chat template of {source} was stopped (line {line}): it went beyond {limit}. Shorten the '
              'conversation, or choose another template.',
        'zh': '{source} 的对话模板渲染被中止（第 {line} 行）：超过了 {limit}。请缩短对话，或选择其他模板。',
    },
    'LMD-175': {
        'en': 'message {index} of the conversation is not usable: {reason}. A message is a dict such as '
              '{{"role": "user", "content": "..."}}.',
        'zh': '对话中第 {index} 条消息无效：{reason}。消息应为形如 {{"role": "user", "content": "..."}} 的字典。',
    },
    'LMD-176': {
        'en': 'message {index} has the role {role!r}, which this chat template does not know. Roles: {roles}.',
        'zh': '第 {index} 条消息的角色为 {role!r}，该对话模板不支持。可用角色：{roles}。',
    },
    'LMD-177': {
        'en': "the model's chat template refuses this conversation: {message}",
        'zh': '模型的对话模板拒绝了此对话：{message}',
    },
    'LMD-178': {
        'en': 'the chat template of {source} failed at line {line}: {reason}. Check the shape of the messages and '
              'tools, or choose another template.',
        'zh': '{source} 的对话模板在第 {line} 行出错：{reason}。请检查消息与工具的格式，或选择其他模板。',
    },
    'LMD-179': {
        'en': 'chat_template_kwargs cannot be used: {reason}. Give at most {most} plain JSON values; {reserved} are set '
              'by the server.',
        'zh': '无法使用 chat_template_kwargs：{reason}。至多 {most} 个简单 JSON 值；{reserved} 由服务器设置。',
    },
    'LMD-180': {
        'en': 'the conversation holds more than {most} different private-use characters or control texts, and cannot '
              'be rendered safely. Remove them.',
        'zh': '对话中不同的私有区字符或控制文本超过 {most} 个，无法安全渲染。请删除它们。',
    },
    'LMD-181': {
        'en': 'the last message is of the assistant, but the chat template of {source} does not let an answer be '
              'continued. End the conversation with a user message.',
        'zh': '最后一条消息来自 assistant，但 {source} 的对话模板不支持续写回答。请以用户消息结束对话。',
    },
    'LMD-182': {
        'en': '{field}={value!r} is not a possible value of a chat template. Choose one of: {choices}.',
        'zh': '对话模板不支持 {field}={value!r}。可选值：{choices}。',
    },
    'LMD-183': {
        'en': 'message {index} has a content part of type {kind!r}, but only text can be rendered here. Leave it out, '
              'or load a vision-language model.',
        'zh': '第 {index} 条消息包含类型为 {kind!r} 的内容，但此处只能渲染文本。请删除它，或加载视觉语言模型。',
    },
    'LMD-184': {
        'en': 'tools must be a list of OpenAI-style tool descriptions, but a {given} was given.',
        'zh': 'tools 应为 OpenAI 格式的工具描述列表，但收到的是 {given}。',
    },
    'LMD-185': {
        'en': '{source} carries no chat template of its own, which "hf" asks for. Choose a named one with '
              'chat_template_config.',
        'zh': '{source} 没有自带的对话模板，无法使用 "hf"。请通过 chat_template_config 选择内置模板。',
    },
    'LMD-186': {
        'en': 'chat_template_config.{field} is a {given}, but must be {wanted}.',
        'zh': 'chat_template_config.{field} 的类型是 {given}，应为 {wanted}。',
    },
}
