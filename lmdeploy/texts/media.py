"""Error texts: where pictures come from, and where they stand in a prompt."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-665': {
        'en': "the picture '{source}' cannot be read: {reason}. Give a path, a URL, base64 text, bytes or a picture of "
              "Pillow's.",
        'zh': "无法读取图片 '{source}'：{reason}。请给出路径、URL、base64 文本、字节串或 Pillow 图片。",
    },
    'LMD-666': {
        'en': "the picture at '{url}' cannot be fetched: {reason}. See whether the address is right and can be reached from "
              'here, or load a local copy.',
        'zh': "无法获取 '{url}' 处的图片：{reason}。请确认地址正确且可从本机访问，或改用本地文件。",
    },
    'LMD-667': {
        'en': '{source} cannot be read as a picture: it is damaged, cut off, or of another format than {formats}. Convert '
              'or save it anew.',
        'zh': '{source} 无法作为图片读取：文件损坏、不完整，或不是以下格式之一：{formats}。请转换格式或重新保存。',
    },
    'LMD-668': {
        'en': 'a picture of {width} x {height} pixels is too large: at most {pixels} pixels, {side} a side, and not longer '
              'than a thin strip. Make it smaller.',
        'zh': '图片尺寸 {width} x {height} 过大：最多 {pixels} 像素，边长不超过 {side}，且不能过于狭长。请缩小图片。',
    },
    'LMD-669': {
        'en': 'a picture of {size} bytes is too large: {most} is the most. Make it smaller, or store it with compression.',
        'zh': '图片大小为 {size} 字节，超过上限 {most}。请缩小图片或使用压缩格式。',
    },
    'LMD-670': {
        'en': "a picture cannot be loaded from a {given}. Give a path, a URL, base64 text, bytes or a picture of Pillow's.",
        'zh': '无法从 {given} 类型加载图片。请给出路径、URL、base64 文本、字节串或 Pillow 图片。',
    },
    'LMD-671': {
        'en': 'the base64 text of a picture is damaged. Encode the whole file, without anything before or after it.',
        'zh': '图片的 base64 文本有误。请对整个文件编码，前后不要附加其他内容。',
    },
    'LMD-672': {
        'en': 'message {index} has {tokens} times <IMAGE_TOKEN>, but {images} pictures. Write it once for each picture, or '
              'not at all.',
        'zh': '第 {index} 条消息中有 {tokens} 个 <IMAGE_TOKEN>，但有 {images} 张图片。请为每张图片各写一个，或完全不写。',
    },
    'LMD-673': {
        'en': 'the rendered prompt has {found} places for {images} pictures: the chat template drops or repeats the text '
              'around them. Use another chat template.',
        'zh': '渲染后的提示词有 {found} 个图片位置，但有 {images} 张图片：对话模板丢弃或重复了相关文本。请更换对话模板。',
    },
    'LMD-674': {
        'en': "a content part of message {index} is of type '{kind}'; this model reads text and pictures (text, image_url, "
              'image).',
        'zh': "第 {index} 条消息的内容块类型为 '{kind}'；该模型只读取文本与图片（text、image_url、image）。",
    },
    'LMD-675': {
        'en': 'a content part of message {index} is of type {kind}, but {reason}.',
        'zh': '第 {index} 条消息中类型为 {kind} 的内容块有误：{reason}。',
    },
    'LMD-676': {
        'en': 'a picture becomes {tokens} tokens, but at most {most} fit into the memory for pictures. Make it smaller, or '
              'ask for less detail.',
        'zh': '一张图片会变成 {tokens} 个 token，而图片缓存最多容纳 {most} 个。请缩小图片或降低 detail。',
    },
    'LMD-677': {
        'en': 'picture {index} of the prompt does not fit its place of {tokens} tokens, or this model reads no pictures.',
        'zh': '提示词中第 {index} 张图片与其 {tokens} 个 token 的位置不符，或该模型不能读取图片。',
    },
    'LMD-678': {
        'en': 'could not fetch the picture of message {index}. The server reaches public addresses only, for up to '
              '{seconds} s and {most} bytes; send the picture as a data URL instead.',
        'zh': '无法获取第 {index} 条消息中的图片。服务器只访问公网地址，最长 {seconds} 秒、最大 {most} 字节；可改用 data URL 发送图片。',
    },
    'LMD-679': {
        'en': 'message {index} names a picture by a URL that this server does not read: it takes {allowed}.',
        'zh': '第 {index} 条消息中的图片 URL 不被此服务器接受：可用的形式有 {allowed}。',
    },
    'LMD-681': {
        'en': "reading videos needs the package av: pip install 'lmdeploy[video]'.",
        'zh': "读取视频需要 av 包：pip install 'lmdeploy[video]'。",
    },
    'LMD-682': {
        'en': "the video '{source}' cannot be read: {reason}.",
        'zh': "无法读取视频 '{source}'：{reason}。",
    },
    'LMD-683': {
        'en': 'a picture of message {index} is invalid: it is damaged, too large, or of another format than {formats}.',
        'zh': '第 {index} 条消息中的图片无效：文件损坏、过大，或不是以下格式之一：{formats}。',
    },
}
