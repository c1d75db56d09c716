"""Error texts: pictures."""

TEXTS: dict[str, dict[str, str]] = {
    'LMD-650': {
        'en': 'max_dynamic_patch = {value}: a picture can be cut into 1 to {most} tiles.',
        'zh': 'max_dynamic_patch = {value}：一张图片可切成 1 到 {most} 块。',
    },
    'LMD-651': {
        'en': "detail = '{value}', but a picture's detail is one of: {known}.",
        'zh': "detail = '{value}'，但图片的 detail 应为以下之一：{known}。",
    },
    'LMD-652': {
        'en': 'a picture of {width} x {height} pixels is too long and thin: this model reads pictures up to {most} times '
              'as long as they are wide. Cut it into several.',
        'zh': '图片尺寸 {width} x {height} 过于狭长：该模型可读的图片长宽比最大为 {most}。请将其切成多张。',
    },
    'LMD-653': {
        'en': 'min_pixels = {least}, max_pixels = {most}: both must be from 1 to {cap}, what the model was made for, and '
              'the first not above the second.',
        'zh': 'min_pixels = {least}，max_pixels = {most}：两者应在 1 到该模型的上限 {cap} 之间，且前者不得大于后者。',
    },
}
