"""A tokenizer as the files of a Hugging Face folder: what a vocabulary inside a GGUF file becomes."""

from __future__ import annotations

import json

from lmdeploy.tokenizer.fast import FastVocabulary
from lmdeploy.tokenizer.spm import SpmVocabulary
from lmdeploy.tokenizer.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files by name: tokenizer.json or tokenizer.model, and tokenizer_config.json with the chat templates.

    They give the ids that ``tokenizer`` gives, here and in transformers.
    """
    vocabulary = tokenizer.vocabulary
    config: dict[str, object] = {
        name: tokenizer.token_piece(token)
        for name, token in (('bos_token', tokenizer.bos_token_id), ('eos_token', tokenizer.eos_token_id),
                            ('pad_token', tokenizer.pad_token_id)) if token is not None}  # fmt: skip
    config |= {'add_bos_token': tokenizer.add_bos, 'clean_up_tokenization_spaces': False}
    templates = tokenizer.chat_templates
    if list(templates) == ['default']:
        config['chat_template'] = templates['default']
    elif templates:
        config['chat_template'] = [{'name': name, 'template': text} for name, text in templates.items()]
    if isinstance(vocabulary, SpmVocabulary):
        config |= {'tokenizer_class': 'LlamaTokenizer', 'legacy': False, 'added_tokens_decoder': {
            str(token.id): {'content': token.content, 'special': token.special, 'lstrip': token.lstrip,
                            'rstrip': token.rstrip, 'normalized': token.normalized, 'single_word': False}
            for token in vocabulary.added.values()}}  # fmt: skip
        files = {'tokenizer.model': vocabulary.model.serialized_model_proto()}
    elif isinstance(vocabulary, FastVocabulary):
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'
        files = {'tokenizer.json': _fast(vocabulary, tokenizer).encode()}
    else:
        raise TypeError(f'{type(vocabulary).__name__} cannot be written')
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    return files | {'tokenizer_config.json': text.encode()}


def _fast(vocabulary: FastVocabulary, tokenizer: Tokenizer) -> str:
    """tokenizer.json, with what puts the bos token before a text."""
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    full = tokenizers.Tokenizer.from_str(vocabulary.full.to_str())
    if tokenizer.add_bos and tokenizer.bos_token_id is not None and vocabulary.affixes == ([], []):
        bos = tokenizer.token_piece(tokenizer.bos_token_id)
        full.post_processor = TemplateProcessing(single=[bos, '$A'], pair=[bos, '$A', '$B'],
                                                 special_tokens=[(bos, tokenizer.bos_token_id)])  # fmt: skip
    return full.to_str()
