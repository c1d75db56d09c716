"""Texts of ``lmdeploy lite``."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-600': {
        'en': '{model} is quantised already ({method}), and what rounding took away does not come back. Give the '
              'original model in 16 bits, or a GGUF file.',
        'zh': '{model} 已经量化（{method}），被舍入丢掉的信息无法恢复。请给出 16 位的原始模型或 GGUF 文件。',
    },
    'LMD-601': {
        'en': 'the layers of {model} hold {count} tensors that are not part of {architecture}: {tensors}. They would be '
              'lost, so nothing was begun. Only plain decoders of the known architectures can be quantised.',
        'zh': '{model} 的层中有 {count} 个张量不属于 {architecture}：{tensors}。量化会丢失它们，因此没有开始。'
              '只能量化已知架构的普通解码器。',
    },
    'LMD-602': {
        'en': 'the inputs of {site} are not finite (channel {channel}) for some calibration token: the weights of this '
              'layer or of one before it are damaged, or overflow. What is done so far is kept; check the model.',
        'zh': '某个校准 token 使 {site} 的输入出现非有限值（通道 {channel}）：该层或之前某层的权重已损坏或溢出。'
              '已完成的部分会保留；请检查模型。',
    },
    'LMD-603': {
        'en': '{folder} holds other files ({files}), and a model is only written to a folder of its own. Give another '
              '--work-dir.',
        'zh': '{folder} 中有其他文件（{files}），而模型只会写入它自己的目录。请换一个 --work-dir。',
    },
    'LMD-604': {
        'en': '{folder} belongs to a run with another model, recipe or calibration text. Give another --work-dir, or '
              '--restart to delete what is there and begin again.',
        'zh': '{folder} 属于另一次运行（模型、方法或校准文本不同）。请换一个 --work-dir，或用 --restart 删除其中内容后重新开始。',
    },
    'LMD-605': {
        'en': '{folder} cannot be written: {reason}. Give another --work-dir.',
        'zh': '无法写入 {folder}：{reason}。请换一个 --work-dir。',
    },
    'LMD-606': {
        'en': 'groups of {group} do not divide the {width} inputs of {layer} ({remainder} would be left over). '
              'Give --w-group-size {proposal}, which divides all layers of this model (possible: {possible}).',
        'zh': '每组 {group} 个通道无法整除 {layer} 的 {width} 个输入（余 {remainder}）。'
              '请使用 --w-group-size {proposal}，它能整除该模型的所有层（可用：{possible}）。',
    },
    'LMD-607': {
        'en': 'the calibration text {path} cannot be used: {reason}.',
        'zh': '校准文本 {path} 无法使用：{reason}。',
    },
    'LMD-608': {
        'en': 'there is no calibration text named {name!r}. Known: {known}; or give a file (text or .jsonl) or a folder '
              'of such files.',
        'zh': '没有名为 {name!r} 的校准文本。可用：{known}；也可以给出文件（文本或 .jsonl）或由此类文件组成的目录。',
    },
    'LMD-609': {
        'en': 'the calibration text {name} has only {found} tokens, and a sample takes {wanted}. Lower '
              '--calib-seqlen, or give more text.',
        'zh': '校准文本 {name} 只有 {found} 个 token，而一个样本需要 {wanted} 个。请减小 --calib-seqlen，或提供更多文本。',
    },
    'LMD-610': {
        'en': '{option} cannot be {value}: {reason}.',
        'zh': '{option} 不能为 {value}：{reason}。',
    },
    'LMD-612': {
        'en': 'the form {form} did not run: {reason}',
        'zh': '{form} 未能运行：{reason}',
    },
    'LMD-611': {
        'en': '--calib-seqlen {value} is more than the {most} tokens that this model takes.',
        'zh': '--calib-seqlen {value} 超过该模型支持的 {most} 个 token。',
    },
    'LMD-630': {
        'en': 'the statistics of the calibration inputs cannot be used: even with {damp} of their mean added they are '
              'not positive definite, which means that values are not finite. Try other calibration text, or '
              '--dtype bfloat16 if the model is read as float16.',
        'zh': '校准输入的统计量无法使用：即使加上均值的 {damp} 倍，矩阵仍非正定，说明其中含有非有限值。'
              '请更换校准文本；若模型以 float16 读取，请改用 --dtype bfloat16。',
    },
    'LMD-631': {
        'en': 'the rotation portable does not fit {architecture}: it normalises the outputs of attention and MLP before '
              'they join the residual stream, and no rotation passes such norms. Give --rotation native or none.',
        'zh': 'portable 旋转不适用于 {architecture}：该架构在注意力与 MLP 的输出加入残差流之前先做归一化，'
              '旋转无法穿过这种归一化。请使用 --rotation native 或 none。',
    },
    'LMD-632': {
        'en': 'the rotation native transforms inputs while the model runs, which files of the format {format} cannot '
              'say. Give --format compressed-tensors, or --rotation portable.',
        'zh': 'native 旋转需要在模型运行时变换输入，而 {format} 格式的文件无法表达这一点。'
              '请使用 --format compressed-tensors，或改用 --rotation portable。',
    },
    'LMD-633': {
        'en': 'no mixture of {choices} bits makes the model as small as {wanted}: the smallest has {least}, the largest '
              '{most}. Give --bits or --budget in between.',
        'zh': '{choices} 比特的任何组合都无法使模型缩小到 {wanted}：最小为 {least}，最大为 {most}。'
              '请给出介于两者之间的 --bits 或 --budget。',
    },
}

NOTES: dict[str, dict[str, str]] = {
    'lite plan': {
        'en': 'lite {method}: {model} -> {folder}, {what}',
        'zh': 'lite {method}：{model} -> {folder}，{what}',
    },
    'lite done already': {
        'en': '{folder} holds the finished result of the same run; nothing was done.',
        'zh': '{folder} 中已有同一次运行的完整结果；没有重新执行。',
    },
    'lite replaced': {
        'en': 'The calibration text is {name}, because what was asked for is not to be had here: {reason}',
        'zh': '校准文本改用 {name}，因为此处无法取得所要求的文本：{reason}',
    },
    'lite calibration': {
        'en': 'calibration: {name}, {samples} x {length} tokens',
        'zh': '校准：{name}，{samples} x {length} 个 token',
    },
    'lite reduced': {
        'en': 'On a CPU statistics are taken from {used} tokens instead of {asked}, which takes minutes instead of hours '
              'and hardly changes the result. --calib-tokens all takes them all.',
        'zh': '在 CPU 上，统计量取自 {used} 个 token（而不是 {asked} 个），只需几分钟而不是几小时，且结果几乎不变。'
              '使用 --calib-tokens all 可使用全部。',
    },
    'lite bundled': {
        'en': 'This is the small text that comes with lmdeploy, the last resort: a text like those that the model will '
              'see (--calib-dataset FILE) gives a better result.',
        'zh': '这是 lmdeploy 自带的少量文本，仅作最后的手段：使用与实际场景相近的文本（--calib-dataset FILE）效果更好。',
    },
    'lite two bits': {
        'en': 'With 2 bits a model of less than about 7B parameters is hardly usable, whatever the method; the report '
              'will say how much is lost.',
        'zh': '无论采用何种方法，参数量小于约 7B 的模型在 2 位下几乎不可用；报告会给出损失的程度。',
    },
    'lite layer': {
        'en': 'layer {index}/{layers}{sites}  {seconds} s  left {left}',
        'zh': '第 {index}/{layers} 层{sites}  {seconds} 秒  剩余 {left}',
    },
    'lite resumed': {
        'en': 'layer {index}/{layers}  was done before',
        'zh': '第 {index}/{layers} 层  此前已完成',
    },
    'lite judge': {
        'en': 'judging on held-out text ...',
        'zh': '正在用留出的文本评判……',
    },
    'lite answers': {
        'en': 'asking both models the same questions (--no-answers leaves this out) ...',
        'zh': '正在向两个模型提出相同的问题（--no-answers 可省略）……',
    },
    'lite form': {
        'en': '{name}: {size}, {memory} while answering, {pace:.1f} tokens/s, accuracy {accuracy:.1%}',
        'zh': '{name}：{size}，回答时占用 {memory}，{pace:.1f} token/s，相对精度 {accuracy:.1%}',
    },
    'lite compared': {
        'en': 'Plots are in {folder}/compare.html.',
        'zh': '图表位于 {folder}/compare.html。',
    },
    'lite report': {
        'en': 'The report is {folder}/quant_report.html. Try the model:',
        'zh': '报告位于 {folder}/quant_report.html。试用模型：',
    },
}
