import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte tokenizer in Kimi's layout: ids 0-255 are bytes, 32 special tokens follow."""
    from k2lab.text.layout import special_block
    from k2lab.text.tokenizer import from_ranks

    return from_ranks([bytes([n]) for n in range(256)], special_block(256, 32))


class PerDocument:
    """The `Model` protocol over a plain transformers model, one document at a time: the slow and obvious way."""

    def __init__(self, hf):
        self.hf = hf
        self.sizes = []

    @property
    def training(self):
        return self.hf.training

    def train(self, mode=True):
        self.hf.train(mode)

    def eval(self):
        self.hf.eval()

    def head(self):
        return self.hf.lm_head.weight

    def hidden(self, batch):
        self.sizes.append(len(batch.tokens_T))
        parts = []
        for begin, end in zip(batch.starts_S1[:-1], batch.starts_S1[1:]):
            tokens = torch.as_tensor(batch.tokens_T[begin:end])[None]
            parts.append(self.hf.model(input_ids=tokens, use_cache=False).last_hidden_state[0])
        return torch.cat(parts)


@pytest.fixture(scope="session")
def hf():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DeepseekV3ForCausalLM(config).eval()


@pytest.fixture
def model(hf):
    return PerDocument(hf)


@pytest.fixture(scope="session")
def token_nats(hf):
    """-log p of tokens[1:], each given all before it, from one plain forward."""

    def compute(tokens):
        ids = torch.as_tensor(list(map(int, tokens)))
        with torch.no_grad():
            logprobs = hf(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        return -logprobs.gather(1, ids[1:, None])[:, 0].numpy()

    return compute
