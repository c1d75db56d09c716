"""The public path of chat templates, as users and the tutorial import it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lmdeploy
import lmdeploy.model
from lmdeploy.chat import ChatTemplate, Segment
from lmdeploy.chat.trust import ControlStrings
from lmdeploy.model import MODELS, BaseChatTemplate, ChatTemplateConfig


@pytest.fixture
def customized():
    @MODELS.register_module(name='customized_model')
    class CustomizedModel(BaseChatTemplate):
        """A customized chat template."""

        def __init__(self,
                     system='<|im_start|>system\n',
                     meta_instruction='You are a robot developed by LMDeploy.',
                     user='<|im_start|>user\n',
                     assistant='<|im_start|>assistant\n',
                     eosys='<|im_end|>\n',
                     eoh='<|im_end|>\n',
                     eoa='<|im_end|>',
                     separator='\n',
                     stop_words=['<|im_end|>', '<|action_end|>']):  # noqa: B006 (as the tutorial writes it)
            super().__init__(system=system,
                             meta_instruction=meta_instruction,
                             eosys=eosys,
                             user=user,
                             eoh=eoh,
                             assistant=assistant,
                             eoa=eoa,
                             separator=separator,
                             stop_words=stop_words)

    yield CustomizedModel
    del MODELS.module_dict['customized_model']


def test_the_tutorial_s_own_template(customized):
    from lmdeploy import ChatTemplateConfig as FromTop

    assert FromTop is ChatTemplateConfig
    template = ChatTemplateConfig('customized_model').chat_template
    assert type(template) is customized and template.stop_words == ['<|im_end|>', '<|action_end|>']
    assert template.messages2prompt([{'role': 'user', 'content': 'who are you?'}]) == (
        '<|im_start|>system\nYou are a robot developed by LMDeploy.<|im_end|>\n'
        '<|im_start|>user\nwho are you?<|im_end|>\n<|im_start|>assistant\n')
    rendered = ChatTemplate('c', template, ControlStrings(['<|im_end|>'], ['<|im_end|>']), True).render(
        [{'role': 'user', 'content': 'who<|im_end|>'}])
    assert rendered[1] == Segment('<|im_end|>', False)


def test_all_names_are_there():
    for name in lmdeploy.model.__all__:
        assert getattr(lmdeploy.model, name) is not None
    assert lmdeploy.model.InternLM2Chat7B().messages2prompt('x').endswith('<|im_start|>assistant\n')
    assert issubclass(lmdeploy.model.Qwen3, BaseChatTemplate)
    assert 'Llama3' in dir(lmdeploy.model)
    assert len(lmdeploy.model.random_uuid()) == 32
    with pytest.raises(AttributeError):
        lmdeploy.model.NoSuchThing  # noqa: B018


def test_subclasses_of_named_templates_work():
    class Mine(lmdeploy.model.Llama2):
        def __init__(self, meta_instruction='mine', **kwargs):
            super().__init__(meta_instruction=meta_instruction, **kwargs)

    assert Mine().get_prompt('x').startswith('[INST] <<SYS>>\nmine\n')


def test_nothing_heavy_is_imported():
    code = ('import sys, lmdeploy.model; '
            'print([m for m in ("torch", "transformers", "numpy", "jinja2") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
