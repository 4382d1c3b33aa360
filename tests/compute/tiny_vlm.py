"""Tiny random vision-language models, LLaVA and Qwen2-VL, with their processors, and prompts with images."""

import torch
from datasets import Dataset
from kit import make_tokenizer
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# As in kit, with parts of messages, of which some are images.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def _tokenizer(special):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def llava():
    tokenizer = _tokenizer(["<image>"])
    images = CLIPImageProcessorPil(
        size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}, do_resize=True, do_center_crop=False
    )
    template = TEMPLATE.replace("IMAGE", "<image>")
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **SIZES)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **SIZES)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, vision_feature_layer=-1
    )
    return _ready(LlavaForConditionalGeneration(config), tokenizer), processor


class ImagesOnly(Qwen2VLProcessor):
    """Without the processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return None if argument is None else super().check_argument_for_proper_class(name, argument)


def qwen2_vl():
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special)
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = ImagesOnly(images, tokenizer, video_processor=None, chat_template=template)
    start, end, image, video = tokenizer.convert_tokens_to_ids(special)
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "rope_parameters": rope, **SIZES}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return _ready(Qwen2VLForConditionalGeneration(config), tokenizer), processor


def _ready(model, tokenizer):
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.eos_token_id, config.pad_token_id, config.bos_token_id = (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            None,
        )
    return model


def picture(number, sizes=((8, 8), (16, 8), (16, 24))):
    """An image of one color; with Qwen2-VL, sizes give different numbers of patches."""
    return Image.new("RGB", sizes[number % len(sizes)], (10 * number % 256, 80, 200))


def questions(count=16, images=lambda number: 1):
    """Prompts with so many images each."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"say {chr(97 + i)}"}],
                "images": [picture(i + k) for k in range(images(i))],
                "answer": chr(97 + i),
                "difficulty": ("easy", "medium", "hard")[i % 3],
            }
            for i in range(count)
        ]
    )
