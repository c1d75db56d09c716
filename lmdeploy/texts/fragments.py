"""Parts of messages that are told as parameters: why something cannot be used, what is wanted, what is too large.

Code gives such a part in English, with its values in place; :func:`translate` finds the entry that it was made from, as
gettext finds a message, and says it in Chinese. What is in no entry (texts of the system and of libraries, names,
numbers) stays as it is.
"""

from __future__ import annotations

import re
from functools import cache, partial

PARAMS = frozenset({'reason', 'what', 'wanted', 'parts'})
"""Parameters that may hold such parts."""

FRAGMENTS: dict[str, str] = {
    # values of any kind
    'a text': '文本',
    'a list': '列表',
    'a number': '数字',
    'a {type}': '{type} 类型',
    'true or false': 'true 或 false',
    'a list of objects': '由对象组成的列表',
    'a list of two sizes': '由两个大小组成的列表',
    'a list of functions': '函数列表',
    'a list of names of layers': '层名称列表',
    'names of layers, or re: and a regular expression without repeated groups':
        '层名称，或 re: 加不含重复分组的正则表达式',
    'a list of {count} positive numbers': '由 {count} 个正数组成的列表',
    'a list of {count} layer types': '由 {count} 个层类型组成的列表',
    'a list of non-empty texts of at most {most} characters': '由非空文本组成的列表，每个文本至多 {most} 个字符',
    'a list of token ids below {size}': '由小于 {size} 的 token id 组成的列表',
    'a list with the name of an architecture': '含有一个架构名称的列表',
    'a dict from token id to number': '从 token id 到数值的字典',
    'a token id or a list of them': '一个 token id 或其列表',
    'a token id or a list of token ids': '一个 token id 或其列表',
    'a token text or an object with content': '词元文本，或含 content 的对象',
    'a map from token ids to objects with content': '从 token id 到含 content 的对象的映射',
    'a text or a list of named templates': '文本，或具名模板的列表',
    'an object with name and template': '含 name 与 template 的对象',
    'an object of named fields': '由具名字段组成的对象',
    'an object of groups of layers': '由层分组组成的对象',
    'an object of regular expressions': '由正则表达式组成的对象',
    'an object of objects': '由对象组成的对象',
    'a whole number from {least} to {most}': '{least} 到 {most} 的整数',
    'a number above {least}, up to {most}': '大于 {least} 且不超过 {most} 的数',
    'a number of channels, or -1 for all': '通道数，或表示全部的 -1',
    'such that an even part of {dim} channels rotates': '使 {dim} 个通道中参与旋转的部分为偶数的值',
    'at least 1, for heads of at least 4 channels': '至少为 1，且每个头至少有 4 个通道',
    'the path of a folder': '目录的路径',
    'a ChatTemplateConfig': 'ChatTemplateConfig',
    'a reward model': '奖励模型',
    'it is a {type}, not an object': '它的类型是 {type}，而不是对象',
    'it is a {type}, not a dict': '它的类型是 {type}，而不是 dict',
    'they are a {type}, not an object': '它们的类型是 {type}，而不是对象',
    'it holds a {type}, not an object': '其中是 {type}，而不是对象',
    'there are {count} of them': '共有 {count} 个',
    '{name} is a {type}, not {wanted}': '{name} 的类型是 {type}，应为{wanted:part}',
    '{name} is a {type}': '{name} 的类型是 {type}',
    '{name} is not a name': '{name} 不是名称',
    '{name} is taken': '{name} 已被占用',
    'unknown fields: {names}': '未知字段：{names}',
    # conversations
    'the conversation is a {type}, not a list': '对话的类型是 {type}，而不是列表',
    'the conversation is empty': '对话为空',
    'a value is a {type}, not plain JSON': '其中一个值的类型是 {type}，不是普通 JSON',
    '"role" is missing or not a text': '"role" 缺失或不是文本',
    '"content" is missing': '缺少 "content"',
    '"content" is a {type}': '"content" 的类型是 {type}',
    '"tool_calls" is not a list of dicts': '"tool_calls" 不是由 dict 组成的列表',
    'it is nested more than {most} levels deep': '嵌套超过 {most} 层',
    'a content part is a {type}, not a dict': '内容的一部分类型是 {type}，而不是 dict',
    'a content part has no "text"': '内容的一部分没有 "text"',
    'its text has a lone surrogate (not Unicode)': '其文本含有孤立的代理字符（不是有效的 Unicode）',
    'it has {found} characters, more than {most}': '共 {found} 个字符，超过 {most} 个',
    # where the tokens of a long prompt are
    '1 prompt': '1 个提示词',
    '{count} messages': '{count} 条消息',
    'system {count}': '系统提示 {count}',
    'history {count}': '历史 {count}',
    'last message {count}': '最后一条消息 {count}',
    'template and tools {count}': '模板与工具 {count}',
    # schemas and regular expressions
    'a lone surrogate is no character': '孤立的代理字符不是字符',
    'a text has a lone surrogate, which is no character': '文本含有孤立的代理字符，它不是字符',
    'it is no JSON: {error}': '不是 JSON：{error}',
    'a {type} is no JSON value': '{type} 不是 JSON 值',
    'an integer is beyond 2^53, where JSON numbers are not exact': '整数超过 2^53，JSON 数字在此之外不精确',
    'a number is not finite': '数字不是有限的',
    'a key is a {type}, not a text': '键的类型是 {type}，而不是文本',
    'size in bytes': '字节数',
    'number of properties, enum entries and alternatives': '属性、枚举项与备选项的总数',
    'size of the regular expressions with repetitions written out': '展开重复后正则表达式的大小',
    'least common multiple of all multipleOf, in units of their last digit': '所有 multipleOf 的最小公倍数（以其末位为单位）',
    'nesting depth': '嵌套深度',
    'nesting depth of groups': '分组的嵌套深度',
    'number of characters of a regular expression': '正则表达式的字符数',
    'count in braces of a regular expression': '正则表达式花括号中的次数',
    'number of digits of multipleOf': 'multipleOf 的位数',
    'the process that compiles grammars {state}': '编译语法的进程 {state}',
    'a schema is an object, true or false, not {given}': 'schema 应为对象、true 或 false，而不是 {given}',
    'it must be a list of schemas, and not empty': '应为非空的 schema 列表',
    'it must be an object of schemas': '应为由 schema 组成的对象',
    'only references within the schema (#/...) are followed, not {given}': '只支持 schema 内部的引用（#/...），不支持 {given}',
    '{given} is none of the types {types}': '{given} 不属于类型 {types}',
    'it must be a list of values, and not empty': '应为非空的值列表',
    'it must be a list of property names': '应为属性名列表',
    'it must be a whole number from 0 on, not {given}': '应为不小于 0 的整数，而不是 {given}',
    'it must be a number, not {given}': '应为数字，而不是 {given}',
    'it must be greater than 0': '应大于 0',
    'it must be a text': '应为文本',
    'no finite value is allowed by it: it is false, or contains itself without an end':
        '它不允许任何有限的值：它为 false，或无止境地包含自身',
    'there is no schema at #{path}': '#{path} 处没有 schema',
    # tokenizers
    'it holds no pieces': '其中没有词元',
    'it is not a SentencePiece model': '不是 SentencePiece 模型',
    '{name} is missing or empty': '{name} 缺失或为空',
    '{name} is not an array': '{name} 不是数组',
    '{name} holds {found} values, wanted {wanted}': '{name} 含有 {found} 个值，应为 {wanted} 个',
    '{name} is {value}, wanted a {type}': '{name} 为 {value}，应为 {type} 类型',
    '{name} is {value}, but there are {count} tokens': '{name} 为 {value}，但共有 {count} 个词元',
    '{count} tokens, but {found} entries in {name}': '共有 {count} 个词元，但 {name} 有 {found} 项',
    'token {token} has type {type}, wanted 1 to 6': '词元 {token} 的类型为 {type}，应为 1 到 6',
    # model configurations
    'hidden_size {size} is not a multiple of {heads} attention heads': 'hidden_size {size} 不是 {heads} 个注意力头的倍数',
    '{heads} attention heads cannot share {groups} key heads evenly': '{heads} 个注意力头无法均分 {groups} 个键头',
    '{count} positions leave none after the first {first}': '{count} 个位置在前 {first} 个之后没有剩余',
    'high_freq_factor {high} is not above low_freq_factor {low}': 'high_freq_factor {high} 不大于 low_freq_factor {low}',
    'weight_block_size needs activation_scheme dynamic': 'weight_block_size 需要 activation_scheme 为 dynamic',
    '{name} is {value}, but the weights are integers': '{name} 为 {value}，但权重是整数',
    # models that read pictures
    'three numbers whose sum is {sum}': '和为 {sum} 的三个数',
    'one over a whole number': '整数分之一',
    'a list of (height, width), in multiples of {side}, of at most {most} tiles':
        '由 (高, 宽) 组成的列表，均为 {side} 的倍数，每项至多 {most} 块',
    'a length in pixels': '以像素为单位的长度',
    'a length in pixels, or two that are equal': '以像素为单位的长度，或两个相等的长度',
    'a list of numbers of layers': '由层编号组成的列表',
    'a multiple of {unit}': '{unit} 的倍数',
    '{patches} patches a side cannot be merged by {merge}': '每边 {patches} 个图像块无法每 {merge} 个合并',
    'pictures are cropped to {found} pixels, but the tower takes {wanted}':
        '图片被裁剪为 {found} 像素，但视觉塔需要 {wanted} 像素',
    '{channels} channels of the tower are not {heads} heads of whole quarters':
        '视觉塔的 {channels} 个通道无法分为 {heads} 个长度为 4 的倍数的头',
    'the tower gives {found} channels, the decoder takes {wanted}': '视觉塔输出 {found} 个通道，解码器需要 {wanted} 个',
    '{name} {size} is not a multiple of {heads} heads': '{name} {size} 不是 {heads} 个头的倍数',
    '{name} {size} is not a multiple of {patch}': '{name} {size} 不是 {patch} 的倍数',
    'the tower has {layers} layers, but layer {layer} is asked for': '视觉塔有 {layers} 层，但要求第 {layer} 层',
    'preprocessor_config.json and the tower differ in {name}': 'preprocessor_config.json 与视觉塔的 {name} 不一致',
    # quantising a model
    'it holds no text files ({names})': '其中没有文本文件（{names}）',
    'it has none of the fields {names}': '没有以下任何字段：{names}',
    'a turn needs role and content, or from and value': '每一轮需要 role 与 content，或 from 与 value',
    'the format of AWQ holds 4 bits; lite w2 and lite w3 have fewer, lite auto_gptq 8':
        'AWQ 的格式只有 4 位；更少的位数见 lite w2 与 lite w3，8 位见 lite auto_gptq',
    'possible are {names}, and 4 in the format awq': '可用：{names}；awq 格式只有 4',
    'possible are {names}': '可用：{names}',
    'it holds float8_e4m3fn only': '它只支持 float8_e4m3fn',
    '{name} has {count} outputs, no multiple of 8': '{name} 有 {count} 个输出，不是 8 的倍数',
    'it is no size such as 4.2GB': '它不是 4.2GB 这样的大小',
    # weight files
    'it is missing': '文件缺失',
    'it has {found} bytes (limit {most})': '共 {found} 字节（上限 {most}）',
    'it nests too deeply': '嵌套过深',
    'it is not JSON ({error})': '不是 JSON（{error}）',
    'it is not a JSON object': '不是 JSON 对象',
    'it is not a list of JSON objects': '不是由 JSON 对象组成的列表',
    'it has no weight_map': '没有 weight_map',
    'its metadata is not an object': '其 metadata 不是对象',
    'total_size is {value}': 'total_size 为 {value}',
    'the file of {tensor} is not a name': '{tensor} 所在的文件不是名称',
    'there is no {one} and no {other}': '既没有 {one}，也没有 {other}',
    '{one} is there, but neither {other} nor {third}': '有 {one}，但既没有 {other}，也没有 {third}',
    'give the path of the GGUF file itself, {path}': '请直接给出 GGUF 文件的路径 {path}',
    'it is a single weight file without its config.json': '这是没有 config.json 的单个权重文件',
    'it is a link to {path}, outside the model folder': '它是指向模型目录之外的 {path} 的链接',
    'it is a link to nowhere': '它是一个失效的链接',
    '{path} is no folder beside it': '{path} 不是与它并列的目录',
    '{file} must name plain files without folders': '{file} 只能列出不含目录的普通文件名',
    '{file} names it, and it is not a safetensors file': '{file} 列出了它，但它不是 safetensors 文件',
    'its header claims {found} bytes (limit {most})': '其文件头声称有 {found} 字节（上限 {most}）',
    'its __metadata__ is not an object of strings': '其 __metadata__ 不是由字符串组成的对象',
    'its name is not one of 1 to {most} printable characters': '其名称不是由 1 到 {most} 个可打印字符组成',
    'it needs exactly dtype, shape and data_offsets': '必须恰好有 dtype、shape 与 data_offsets',
    'dtype {value} is unknown': '未知的 dtype {value}',
    'shape {value} is not a list of at most {most} sizes': 'shape {value} 不是由至多 {most} 个大小组成的列表',
    'data_offsets {value} are not two positions': 'data_offsets {value} 不是两个位置',
    '{dtype} of shape {shape} does not take the {found} bytes it claims': '形状为 {shape} 的 {dtype} 不占用其声称的 {found} 字节',
    'stored as {one} beside {other}': '{one} 与 {other} 并存',
    'layers of {one} and {other} cannot be joined': '{one} 的层与 {other} 的层无法合并',
    'layers of {one} that sort their inputs differently cannot be joined': '{one} 的层对输入的排序不同，无法合并',
    'its tensors are {names}': '其张量为 {names}',
    'weight_shape is {shape}': 'weight_shape 为 {shape}',
    '{count} words of 32 bits do not hold codes of {bits} bits': '{count} 个 32 位字无法存放 {bits} 位的编码',
    'g_idx does not give every group {count} channels': 'g_idx 没有为每组分配 {count} 个通道',
    'zero_point is false, but there are zero points other than {value}': 'zero_point 为 false，但存在不等于 {value} 的零点',
    'sym is true, but there is the zero point {found} instead of {wanted}':
        'sym 为 true，但存在零点 {found}，而不是 {wanted}',
    'it is symmetric, but {name} is not zero': '量化是对称的，但 {name} 不为零',
    'its range {problem}': '其范围有误：{problem}',
    '{count} bytes belong to no tensor': '有 {count} 字节不属于任何张量',
    'does not fit {other}': '与 {other} 不符',
    'it starts with {found}, not with {wanted}': '其开头是 {found}，而不是 {wanted}',
    'it is written for big-endian machines': '它是为大端序机器写的',
    'it has GGUF version {found}, not 2 or 3': '其 GGUF 版本为 {found}，而不是 2 或 3',
    'a string is not UTF-8: {error}': '有字符串不是 UTF-8：{error}',
    'says that the model is split over several files; join them with llama-gguf-split --merge':
        '表明模型分为多个文件；请用 llama-gguf-split --merge 合并',
    'differs from the key length {length}': '与键长度 {length} 不同',
    'differs from the head size {size} (partial rotation)': '与头大小 {size} 不同（部分旋转）',
    'is missing': '缺失',
    'is {value}, not of type {kind}': '为 {value}，类型不是 {kind}',
    'is {value}, not one positive integer for all layers': '为 {value}，而不是适用于所有层的一个正整数',
    'is {value}, not a positive number': '为 {value}，而不是正数',
    'is {value}, which does not divide {other}': '为 {value}，无法整除 {other}',
    'is of type {kind} and shape {shape}': '类型为 {kind}，形状为 {shape}',
    'has values that are not positive numbers': '含有非正数的值',
    'has the shape {shape} for heads of size {size}': '形状为 {shape}，而头大小为 {size}',
    # options of a server
    'it must hold options as NAME: VALUE': '其中的选项应写作 NAME: VALUE',
    'with --allow-origins "*" every page could act for its reader; name the origins':
        '使用 --allow-origins "*" 时，任何网页都能以其读者的身份操作；请指明来源',
    'it must be a number from 0': '应为不小于 0 的数',
    'it must be a number of seconds from 0': '应为不小于 0 的秒数',
    'it must be a positive number of seconds': '应为正的秒数',
    'on an address that others can reach, administrative routes need --admin-api-keys':
        '在他人可以访问的地址上，管理接口需要 --admin-api-keys',
    'the proxy takes no server without its node key; set LMDEPLOY_NODE_KEY':
        '代理不接受没有节点密钥的服务器；请设置 LMDEPLOY_NODE_KEY',
    'nodes that only read prompts or only write answers are not supported': '不支持只处理提示词或只生成回答的节点',
    'choose text or json': '请选择 text 或 json',
    'known limits are {names}': '已知的上限有 {names}',
    'the value must be a whole number from {least}': '值应为不小于 {least} 的整数',
    'a key has 1 to {most} bytes and no spaces around it': '密钥有 1 到 {most} 字节，且前后没有空格',
    'it holds no key': '其中没有密钥',
    'a port is a number from 0 to 65535': '端口是 0 到 65535 的数',
    'SSL_KEYFILE or SSL_CERTFILE is not set': '未设置 SSL_KEYFILE 或 SSL_CERTFILE',
    'it is no network, address or host name': '不是网络、地址或主机名',
    'it is larger than {most} bytes': '超过 {most} 字节',
    # pictures
    'no such file': '文件不存在',
    'it must be a folder': '应为文件夹',
    'it must be an address, or a network such as 10.0.0.0/8': '应为地址，或形如 10.0.0.0/8 的网段',
    'its picture is missing': '缺少图片',
    'its text is missing': '缺少文本',
    'it must be an object': '应为对象',
    '{name} is of the wrong type': '{name} 的类型不正确',
    'num_frames must be from 1 to {most}, fps above 0': 'num_frames 应为 1 到 {most}，fps 应大于 0',
    'only text and pictures are read here': '此处只读取文本与图片',
}
"""By the English part. A name in braces stands for any text, ``{name}`` and ``{type}`` for one word; in Chinese,
``{wanted:part}`` stands for one that is a part itself."""

WORDS = {'name': r'\S+', 'type': r'\w+'}
FIELD = re.compile(r'\{(\w+)(:part)?\}')


def translate(text: str) -> str:
    """A part in Chinese; of a list of parts (``a, b; c``) each."""
    found = _one(text)
    if found is not None:
        return found
    pieces = re.split(r'(; |, )', text)
    each = [piece if piece in ('; ', ', ') else _one(piece) for piece in pieces]
    if None in each:
        return text
    return ''.join(piece for piece in each if piece is not None).replace('; ', '；').replace(', ', '、')


def _one(text: str) -> str | None:
    if text in FRAGMENTS:
        return FRAGMENTS[text]
    for pattern, chinese in _patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            return FIELD.sub(partial(_fill, match), chinese)
    return None


def _fill(match: re.Match[str], field: re.Match[str]) -> str:
    value = match[field[1]]
    return translate(value) if field[2] else value


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    """The entries with values, those with the most text of their own first: they say most."""
    entries = sorted((entry for entry in FRAGMENTS.items() if '{' in entry[0]),
                     key=lambda entry: -len(FIELD.sub('', entry[0])))
    return tuple((_pattern(english), chinese) for english, chinese in entries)


def _pattern(english: str) -> re.Pattern[str]:
    places = FIELD.split(english)  # text, name, ':part' or None, text, ...
    found = [re.escape(places[0])]
    for name, text in zip(places[1::3], places[3::3]):
        found.append(f'(?P<{name}>{WORDS.get(name, ".+?")}){re.escape(text)}')
    return re.compile(''.join(found), re.DOTALL)
