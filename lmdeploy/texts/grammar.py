"""Error texts: structured output."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-320': {
        'en': 'response_format {given} is not one of the known forms. Give one of: {forms}.',
        'zh': 'response_format {given} 不是已知的形式。请使用以下之一：{forms}。',
    },
    'LMD-321': {
        'en': 'the grammar of response_format is too large: its {what} is {found}, the limit is {most}. Make it smaller.',
        'zh': 'response_format 的语法过大：{what} 为 {found}，上限为 {most}。请缩小它。',
    },
    'LMD-322': {
        'en': 'the JSON schema uses {keyword!r} at {where}, which cannot be enforced, so the answer might not follow it. '
              'Remove it, or express it with the supported keywords.',
        'zh': 'JSON schema 在 {where} 处使用了 {keyword!r}，它无法被强制执行，答案可能不符合它。请删除它，或改用受支持的关键字。',
    },
    'LMD-323': {
        'en': 'the JSON schema is not valid at {where}: {reason}. Correct it.',
        'zh': 'JSON schema 在 {where} 处无效：{reason}。请更正。',
    },
    'LMD-324': {
        'en': 'the regular expression {pattern!r} is not supported at position {position}: {reason}. Rewrite it.',
        'zh': '正则表达式 {pattern!r} 在位置 {position} 处不受支持：{reason}。请改写。',
    },
    'LMD-325': {
        'en': 'the grammar of response_format cannot be used: {reason}. Change the schema or the regular expression.',
        'zh': 'response_format 的语法无法使用：{reason}。请修改 schema 或正则表达式。',
    },
    'LMD-326': {
        'en': 'the grammar of response_format is too complex: compiling it took more than {seconds} s or too much memory. '
              'Make it simpler.',
        'zh': 'response_format 的语法过于复杂：编译超过 {seconds} 秒或占用内存过多。请简化它。',
    },
    'LMD-327': {
        'en': 'response_format needs the package llguidance (of the extra "serve"), which is not installed. '
              'Run: pip install llguidance.',
        'zh': 'response_format 需要 llguidance 包（属于扩展 "serve"），但尚未安装。请运行：pip install llguidance。',
    },
    'LMD-328': {
        'en': 'response_format cannot be combined with ignore_eos, nor used with a model without an end token: a complete '
              'answer could not end. Leave one of them out.',
        'zh': 'response_format 不能与 ignore_eos 同时使用，也不能用于没有结束 token 的模型：完整的答案将无法结束。请去掉其一。',
    },
    'LMD-329': {
        'en': 'a tool call is forced, but {given} is no tool of the request. Tools have the form '
              '{{"type": "function", "function": {{"name": ..., "parameters": {{...}}}}}}.',
        'zh': '请求强制调用工具，但 {given} 不是该请求中的工具。工具的形式为 '
              '{{"type": "function", "function": {{"name": ..., "parameters": {{...}}}}}}。',
    },
}
