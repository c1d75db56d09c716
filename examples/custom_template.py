"""Register a chat template of your own and talk through it."""

import sys

from lmdeploy import ChatTemplateConfig, GenerationConfig, pipeline
from lmdeploy.model import MODELS, BaseChatTemplate


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
                 stop_words=('<|im_end|>', '<|action_end|>')):
        super().__init__(system=system,
                         meta_instruction=meta_instruction,
                         eosys=eosys,
                         user=user,
                         eoh=eoh,
                         assistant=assistant,
                         eoa=eoa,
                         separator=separator,
                         stop_words=list(stop_words))


model = sys.argv[1] if len(sys.argv) > 1 else 'smollm2:135m'
messages = [{'role': 'user', 'content': 'who are you?'}]
pipe = pipeline(model, chat_template_config=ChatTemplateConfig('customized_model'))
for response in pipe.stream_infer(messages, gen_config=GenerationConfig(max_new_tokens=64)):
    print(response.text, end='')
print()
