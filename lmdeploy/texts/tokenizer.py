"""Error texts: tokenizers and the texts given to them."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-150': {
        'en': 'no tokenizer in {path}: neither tokenizer.json nor tokenizer.model is there. Fetch the model again with '
              'its tokenizer files, or give a .gguf file, which carries its own.',
        'zh': '{path} 中没有分词器：既无 tokenizer.json，也无 tokenizer.model。'
              '请重新获取包含分词器文件的模型，或使用自带分词器的 .gguf 文件。',
    },
    'LMD-151': {
        'en': 'the tokenizer file {file} cannot be read: {reason}. It is damaged, or not of this kind; fetch it again.',
        'zh': '无法读取分词器文件 {file}：{reason}。文件已损坏或类型不符，请重新获取。',
    },
    'LMD-152': {
        'en': '{file}: field {field} is {value}, but must be {want}. Correct the file, or fetch it again.',
        'zh': '{file}：字段 {field} 为 {value}，但应为 {want}。请修正该文件或重新获取。',
    },
    'LMD-153': {
        'en': 'tokenizer and model do not fit: token {token!r} has id {id}, but the model ({file}) has {rows} '
              'embedding rows. Use the tokenizer that came with this model.',
        'zh': '分词器与模型不匹配：token {token!r} 的 id 为 {id}，而模型（{file}）的词嵌入只有 {rows} 行。'
              '请使用该模型自带的分词器。',
    },
    'LMD-154': {
        'en': '{file} is a SentencePiece vocabulary, which needs the package sentencepiece. '
              'Install it: pip install sentencepiece',
        'zh': '{file} 是 SentencePiece 词表，需要 sentencepiece 包。请安装：pip install sentencepiece',
    },
    'LMD-155': {
        'en': '{file}: tokenizer model {model!r} is not known. Known ones: {known}. Take a GGUF file of a supported '
              'model.',
        'zh': '{file}：未知的分词器类型 {model!r}。支持的类型：{known}。请换用受支持模型的 GGUF 文件。',
    },
    'LMD-156': {
        'en': '{file}: pre-tokenizer {pre!r} is not known, and a wrong one would give wrong tokens without any sign. '
              'Known ones: {known}. Use the Hugging Face folder of this model.',
        'zh': '{file}：未知的预分词器 {pre!r}；若用错则会悄悄产生错误的 token。'
              '支持的有：{known}。请改用该模型的 Hugging Face 文件夹。',
    },
    'LMD-157': {
        'en': '{file}: the vocabulary in the GGUF metadata is not usable: {reason}. Fetch or convert the file again.',
        'zh': '{file}：GGUF 元数据中的词表不可用：{reason}。请重新获取或转换该文件。',
    },
    'LMD-158': {
        'en': 'the tokenizer of {path} exists only as code or a pickle ({files}), and nothing is ever executed from a '
              'model folder. Use a version of the model that has tokenizer.json or tokenizer.model, or a .gguf file.',
        'zh': '{path} 的分词器仅以代码或 pickle 形式存在（{files}），而模型文件夹中的代码绝不会被执行。'
              '请使用带有 tokenizer.json 或 tokenizer.model 的模型版本，或 .gguf 文件。',
    },
    'LMD-159': {
        'en': '{file}: {field} is {token!r}, which is not in the vocabulary. Correct the file, or fetch it again.',
        'zh': '{file}：{field} 为 {token!r}，但词表中没有它。请修正该文件或重新获取。',
    },
    'LMD-160': {
        'en': 'the text is not valid Unicode: a lone surrogate (U+{point:04X}) at character {position}. Decode the '
              "input with errors='replace', or remove that character.",
        'zh': "文本不是合法的 Unicode：第 {position} 个字符为孤立代理项（U+{point:04X}）。"
              "请用 errors='replace' 解码输入，或删去该字符。",
    },
    'LMD-161': {
        'en': '{file}: the decoder {decoder!r} is not supported. Supported: ByteLevel, Metaspace, WordPiece, '
              'and sequences of Replace, ByteFallback, Fuse and a leading Strip.',
        'zh': '{file}：不支持解码器 {decoder!r}。支持：ByteLevel、Metaspace、WordPiece，'
              '以及由 Replace、ByteFallback、Fuse 和开头 Strip 组成的序列。',
    },
    'LMD-162': {
        'en': 'stop string number {index} is empty: it would end every answer before its first character. '
              'Leave it out.',
        'zh': '第 {index} 个停止字符串为空，它会使每个回答在第一个字符之前就结束。请去掉它。',
    },
    'LMD-163': {
        'en': 'a text to tokenize must be a str, but {given} was given.',
        'zh': '待分词的文本必须是 str，但收到的是 {given}。',
    },
}
