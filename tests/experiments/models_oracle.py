"""Models of images at inference, written out: what the stages must come to."""

import jax
import jax.numpy as jnp
from jax import lax


class Weights:
    """Parameters and statistics of the stages that have any, in the order of the stages."""

    def __init__(self, params, statistics):
        names = sorted(params, key=lambda name: int(name.removeprefix("layers_")))
        self._rest = iter([(params[name], statistics.get(name)) for name in names])

    def take(self):
        return next(self._rest)

    def conv(self, x, stride=1):
        w, _ = self.take()
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w["kernel"], (stride, stride), "SAME", None, None, dims)
        return y + w.get("bias", 0.0)

    def norm(self, x):
        w, s = self.take()
        return (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * w["scale"] + w["bias"]

    def layer_norm(self, x):
        w, _ = self.take()
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * w[
            "scale"
        ] + w["bias"]

    def dense(self, x):
        w, _ = self.take()
        return x @ w["kernel"] + w["bias"]

    def conv_norm_relu(self, x, stride=1):
        return relu(self.norm(self.conv(x, stride)))

    def classify(self, x):
        return jax.nn.log_softmax(self.dense(x))

    def done(self):
        assert next(self._rest, None) is None


def relu(x):
    return jnp.maximum(x, 0)


def windows(x):
    """[batch, height / 2, width / 2, 4, channels]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(b, h // 2, w // 2, 4, c)


def mlp(w, x):
    return w.classify(relu(w.dense(x.reshape(len(x), -1))))


def resnet18(w, x):
    x = w.conv_norm_relu(x)
    for i in range(4):
        stride = 2 if i else 1
        y = w.norm(w.conv(w.conv_norm_relu(x, stride)))
        x = relu(y + (w.norm(w.conv(x, stride)) if i else x))
    return w.classify(x.mean((1, 2)))


def resnet50(w, x):
    x = w.conv_norm_relu(x, 2)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for i in range(4):
        stride = 2 if i else 1
        y = w.norm(w.conv(w.conv_norm_relu(w.conv_norm_relu(x), stride)))
        x = relu(y + w.norm(w.conv(x, stride)))
    return w.classify(x.mean((1, 2)))


def vgg(w, x):
    for number in (1, 2):
        for _ in range(number):
            x = w.conv_norm_relu(x)
        x = windows(x).max(3)
    return w.classify(relu(w.dense(relu(w.dense(x.reshape(len(x), -1))))))


def wide_resnet(w, x):
    x = w.conv(x)
    for stride in (1, 2, 2):
        a = relu(w.norm(x))  # both branches take it
        y = w.conv(relu(w.norm(w.conv(a, stride))))
        x = y + w.conv(a, stride)
        x = w.conv(relu(w.norm(w.conv(relu(w.norm(x)))))) + x
    return w.classify(relu(w.norm(x)).mean((1, 2)))


def pyramidnet(w, x):
    x = w.norm(w.conv(x))
    for stride in (1, 2, 2):
        y = w.conv(w.norm(x))
        y = w.conv(relu(w.norm(y)), stride)
        y = w.norm(w.conv(relu(w.norm(y))))
        x = windows(x).mean(3) if stride == 2 else x
        more = y.shape[-1] - x.shape[-1]
        x = y + jnp.concatenate([x, jnp.zeros((*x.shape[:3], more))], -1)
    return w.classify(relu(w.norm(x)).mean((1, 2)))


def vit(w, x):
    kernel = w.take()[0]
    p, _, c, d = kernel["kernel"].shape
    b, h, _, _ = x.shape
    patches = x.reshape(b, h // p, p, h // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
    x = patches @ kernel["kernel"].reshape(-1, d) + kernel["bias"]
    token, positions = w.take()[0]["class_token"], w.take()[0]["positions"]
    x = jnp.concatenate([jnp.tile(token, (b, 1, 1)), x], 1) + positions
    x = x + attention(w.layer_norm(x), w)
    x = x + w.dense(gelu(w.dense(w.layer_norm(x))))
    return w.classify(w.layer_norm(x)[:, 0])


def attention(x, weights):
    w, _ = weights.take()
    q, k, v = (
        jnp.einsum("btd,dhk->bhtk", x, w[name]["kernel"]) + w[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    scores = jax.nn.softmax(q @ k.swapaxes(2, 3) / jnp.sqrt(q.shape[-1]))
    return jnp.einsum("bhtk,hkd->btd", scores @ v, w["out"]["kernel"]) + w["out"]["bias"]


def gelu(x):
    return x / 2 * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))
