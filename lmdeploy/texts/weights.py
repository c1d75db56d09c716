"""Error texts: weight files."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-120': {
        'en': '{path} holds no weights: {reason}. Give a folder with config.json and model.safetensors (or its shards '
        'and model.safetensors.index.json), or a .gguf file.',
        'zh': '{path} 中没有可用的权重：{reason}。请给出包含 config.json 与 model.safetensors（或分片与 '
        'model.safetensors.index.json）的文件夹，或一个 .gguf 文件。',
    },
    'LMD-121': {
        'en': '{path} has its weights only as pickle files ({files}). Opening such a file can run any code that its '
        'author put in, so it is never opened. Use a safetensors version of the model, or convert it yourself on a '
        'machine you can lose (transformers: save_pretrained(..., safe_serialization=True)).',
        'zh': '{path} 的权重只有 pickle 格式（{files}）。打开这种文件可能执行其作者放入的任意代码，因此绝不打开。'
        '请使用该模型的 safetensors 版本，或在隔离的机器上自行转换'
        '（transformers：save_pretrained(..., safe_serialization=True)）。',
    },
    'LMD-122': {
        'en': '{file} cannot be used: {reason}. Every Hugging Face model folder needs it; download it again.',
        'zh': '{file} 无法使用：{reason}。每个 Hugging Face 模型文件夹都需要它，请重新下载。',
    },
    'LMD-123': {
        'en': '{file} is truncated: it has {size} bytes and needs at least {needed}. The download was probably cut '
        'off; fetch the file again.',
        'zh': '{file} 不完整：只有 {size} 字节，至少需要 {needed} 字节。下载很可能中断了，请重新下载该文件。',
    },
    'LMD-124': {
        'en': '{file} is not a valid safetensors file: {reason}. Fetch it again, or ask its author.',
        'zh': '{file} 不是有效的 safetensors 文件：{reason}。请重新下载，或联系其作者。',
    },
    'LMD-125': {
        'en': 'Tensor {tensor!r} in {file} is described wrongly: {reason}. The file is corrupt; fetch it again.',
        'zh': '{file} 中张量 {tensor!r} 的描述有误：{reason}。文件已损坏，请重新下载。',
    },
    'LMD-126': {
        'en': '{file} is not a valid index of shards: {reason}. Fetch it again.',
        'zh': '{file} 不是有效的分片索引：{reason}。请重新下载。',
    },
    'LMD-127': {
        'en': '{count} of the {total} files that {index} names are missing: {files}. Download the model again; '
        'finished files are kept.',
        'zh': '{index} 列出的 {total} 个文件中缺少 {count} 个：{files}。请重新下载模型，已完成的文件会保留。',
    },
    'LMD-128': {
        'en': '{file} is refused: {reason}. Model files must be plain files of the model folder itself '
        '(or of its Hugging Face cache entry).',
        'zh': '拒绝 {file}：{reason}。模型文件必须是模型文件夹（或其 Hugging Face 缓存条目）内的普通文件。',
    },
    'LMD-129': {
        'en': '{file} is not a GGUF file that can be read: {reason}. Versions 2 and 3 in little-endian order are '
        'supported.',
        'zh': '{file} 不是可读取的 GGUF 文件：{reason}。支持小端序的第 2、3 版。',
    },
    'LMD-130': {
        'en': '{file} has a corrupt GGUF header (near byte {offset}): {reason}. Fetch the file again.',
        'zh': '{file} 的 GGUF 文件头已损坏（第 {offset} 字节附近）：{reason}。请重新下载该文件。',
    },
    'LMD-131': {
        'en': 'Tensor {tensor!r} in {file} has the type {found}, which is not supported. Supported: {known}. '
        'Choose a file with another quantisation, such as Q4_K_M or Q8_0.',
        'zh': '{file} 中张量 {tensor!r} 的类型为 {found}，不受支持。支持的类型：{known}。'
        '请选择其他量化版本的文件，例如 Q4_K_M 或 Q8_0。',
    },
    'LMD-132': {
        'en': 'The model needs tensor {tensor!r}, which {file} does not have. The files are incomplete, or belong to '
        'another model than config.json says.',
        'zh': '模型需要张量 {tensor!r}，但 {file} 中没有。文件不完整，或与 config.json 所述的模型不符。',
    },
    'LMD-133': {
        'en': 'Tensor {tensor!r} in {file} has the shape {found}; the model needs {wanted}. The weights and the '
        'configuration belong to different models.',
        'zh': '{file} 中张量 {tensor!r} 的形状为 {found}，模型需要 {wanted}。权重与配置不属于同一个模型。',
    },
    'LMD-134': {
        'en': '{count} tensors of {file} belong to no part of the model: {tensors}. The architecture in the '
        'configuration does not fit these weights.',
        'zh': '{file} 中有 {count} 个张量不属于模型的任何部分：{tensors}。配置中的架构与这些权重不符。',
    },
    'LMD-135': {
        'en': 'Tensor {tensor!r} appears twice in {file}. The file is corrupt; fetch it again.',
        'zh': '张量 {tensor!r} 在 {file} 中出现两次。文件已损坏，请重新下载。',
    },
    'LMD-136': {
        'en': '{index} and the shards disagree: {reason}. The files belong to different versions of the model; '
        'download it again.',
        'zh': '{index} 与分片不一致：{reason}。这些文件属于模型的不同版本，请重新下载。',
    },
    'LMD-137': {
        'en': '{file} holds a model of the GGUF architecture {found!r}, which is not supported. Supported: {known}.',
        'zh': '{file} 中模型的 GGUF 架构为 {found!r}，不受支持。支持的架构：{known}。',
    },
    'LMD-138': {
        'en': 'The metadata of {file} cannot be used: {key} {reason}. Use a file made by a current converter.',
        'zh': '{file} 的元数据无法使用：{key} {reason}。请使用由新版转换工具生成的文件。',
    },
    'LMD-139': {
        'en': '{file} cannot be read: {reason}. Check that it exists, that you may read it, and that its disk works.',
        'zh': '无法读取 {file}：{reason}。请检查文件是否存在、是否有读取权限以及磁盘是否正常。',
    },
    'LMD-140': {
        'en': 'Tensor {tensor!r} in {file} has the type {found}; the format {format} needs {wanted}. The weights and '
        'quantization_config belong to different models, or another tool wrote a variant of the format.',
        'zh': '{file} 中张量 {tensor!r} 的类型为 {found}，{format} 格式需要 {wanted}。权重与 quantization_config 不属于同一个模型，'
        '或由其他工具写成了该格式的变体。',
    },
    'LMD-141': {
        'en': 'The layers {layers} in {file} are multiplied as one, but are quantised differently: {reason}. Quantise '
        'them alike, or leave all of them out.',
        'zh': '{file} 中的层 {layers} 需合并为一层计算，但量化方式不同：{reason}。请以相同方式量化它们，或全部不量化。',
    },
    'LMD-142': {
        'en': 'The layer {layer} in {file} is not stored as quantization_config says ({format}): {reason}. The weights '
        'and the configuration belong to different models.',
        'zh': '{file} 中的层 {layer} 与 quantization_config 所述的存储方式（{format}）不符：{reason}。权重与配置不属于同一个模型。',
    },
}
