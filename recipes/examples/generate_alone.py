"""Generates with transformers alone, from the folder `stock` that `save_pretrained("stock", stock=True)` wrote.

For full attention; of BERT and ESM take AutoModelForMaskedLM, and as `row` the text with mask tokens at its blanks.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # 5.6 or newer

model = AutoModelForCausalLM.from_pretrained("stock")  # LLaDA: dtype="float32", for its rotary angles
tokenizer = AutoTokenizer.from_pretrained("stock")
prompt = tokenizer("What is 17 + 25?", return_tensors="pt").input_ids  # a chat model: apply_chat_template
mask, new, block, shift = model.config.mask_token_id, 64, 32, 0  # Dream: shift = 1
row = torch.cat([prompt, torch.full((1, new), mask)], 1)
for end in range(prompt.shape[1] + block, row.shape[1] + 1, block):
    for _ in range(block):  # likeliest token first
        with torch.no_grad():
            logits = model(row).logits.float().roll(shift, 1)
        logits[..., mask] = -torch.inf
        likeliest, tokens = logits.softmax(-1).max(-1)
        likeliest[row != mask] = -1
        place = likeliest[0, :end].argmax()
        row[0, place] = tokens[0, place]
print(tokenizer.decode(row[0, prompt.shape[1] :]).split(tokenizer.eos_token)[0])
