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
"""The products that the head is made of: what torch's `mm` and `addmm` return for 16-bit factors, and how fast.

Three of them, as `head.py` calls them: float32 sums of 16-bit factors (`out_dtype`), the same written to a slice of
memory that is there, and added to a float32 total. The truth is the product in float64. Sums in float32 are some 1e-6
of the largest entry away from it, sums that were rounded to bfloat16 some 1e-3.
"""

import record
import torch

TOLERANCE = 1e-5  # of the largest entry


def main() -> None:
    step = record.of_arguments(__doc__)
    rows, width, vocab = step.choose((256, 2048, 151936), (8, 32, 997))
    is_cuda = step.device == "cuda"
    wide = {"out_dtype": torch.float32} if is_cuda else {}
    generator = torch.Generator(step.device).manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        dtype = torch.bfloat16 if is_cuda else torch.float32  # a processor has no such products
        return torch.randn(shape, device=step.device, generator=generator).to(dtype)

    hidden, weight, gradient = factor(rows, width), factor(vocab, width), factor(rows, vocab)
    logits = torch.empty(rows + 3, vocab, device=step.device)
    total = torch.zeros(vocab, width, device=step.device)
    products = {
        "mm": (lambda: torch.mm(hidden, weight.T, **wide), hidden, weight.T),
        "mm, out= a slice": (lambda: torch.mm(hidden, weight.T, **wide, out=logits[:rows]), hidden, weight.T),
        "addmm": (lambda: torch.addmm(total, gradient.T, hidden, **wide, out=total), gradient.T, hidden),
    }
    for name, (call, a, b) in products.items():
        total.zero_()
        found, truth = call(), a.double() @ b.double()
        error = ((found - truth).abs().max() / truth.abs().max()).item()
        del truth
        seconds = record.seconds_of(call, step.device, repeats=5)
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        is_right = error <= TOLERANCE and found.dtype == torch.float32
        step.add(product=name, error=error, is_right=is_right, seconds=seconds, teraflops=flops / seconds / 1e12)
    step.require_all("is_right")


if __name__ == "__main__":
    main()
