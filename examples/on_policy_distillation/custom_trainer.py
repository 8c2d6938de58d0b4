# Copyright 2026 The on-policy-distillation authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""On-policy distillation in a training loop of your own: two teachers mixed exactly, a tied head, no logits.

    python examples/on_policy_distillation/custom_trainer.py

It generates, scores and updates, and prints the KL of each step. Beside torch and transformers it needs
verl/on_policy_distillation/head.py and the files which that imports (divergence, mixture, buckets and roofline; on a
GPU divergence_triton too): no Ray and no trainer, and VERL need not be installed, as with PYTHONPATH=. in this
repository. The models are made here; yours go in their place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from verl.on_policy_distillation.head import linear_divergence

VOCABULARY, END, PADDING = 64, 1, 0
TEACHER_WEIGHTS = [0.7, 0.3]


def make_model(seed, width, is_tied=False):
    """A small causal language model. Its wide random weights make it sure of something, so that there is a KL."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.15,
            tie_word_embeddings=is_tied,
            eos_token_id=END,
            pad_token_id=PADDING,
        )
    ).eval()


def generate(student, prompts, tokens):
    """The prompts with the student's own continuations, and which of the positions predict a token of them.

    Returns:
        sequences: (samples, length) token ids; is_predicting: (samples, length - 1), false in the prompt and after END.
    """
    sequences = student.generate(prompts, do_sample=True, top_k=0, max_new_tokens=tokens)
    is_end = sequences[:, prompts.shape[1] :] == END
    is_written = is_end.cumsum(1) - is_end.long() == 0  # up to the first END and with it; then comes padding
    return sequences, torch.nn.functional.pad(is_written, (prompts.shape[1] - 1, 0))  # of t: predicts token t + 1


def hidden_states(model, sequences, is_predicting):
    """(tokens, width): the last hidden states of the positions that predict the response. No logits are made."""
    return model.model(sequences).last_hidden_state[:, :-1][is_predicting]


def distillation_loss(student, teachers, sequences, is_predicting):
    """The mean KL of the student to the mixture of its teachers, with its gradient."""
    with torch.no_grad():
        said = [hidden_states(teacher, sequences, is_predicting) for teacher in teachers]
    return linear_divergence(
        hidden_states(student, sequences, is_predicting),
        student.get_output_embeddings().weight,  # tied: the embedding, whose gradient is the sum of both uses
        said,
        [teacher.get_output_embeddings().weight for teacher in teachers],
        teacher_weights=TEACHER_WEIGHTS,
        distillation_type="reverse_kl",
    ).loss


def main(steps=12, samples=32):
    student = make_model(0, width=32, is_tied=True)
    teachers = [make_model(1, width=48), make_model(2, width=64)]  # of any width, with one vocabulary
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        prompts = torch.randint(2, VOCABULARY, (samples, 4))
        sequences, is_predicting = generate(student, prompts, tokens=8)
        loss = distillation_loss(student, teachers, sequences, is_predicting)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2d}/{steps}   KL {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
