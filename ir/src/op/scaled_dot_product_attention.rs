//! ONNX's `Attention` (<https://onnx.ai/onnx/operators/onnx__Attention.html>, opset 23) in the form that TensorRT's parser
//! takes: by head, without past.

use super::attention::scaled;
use super::{
    Add, Attributes, MatMul, OnnxForm, OpError, Operator, Reshape, Softmax, Transpose, expect_fact,
    expect_inputs, expect_rank, input_error,
};
use crate::graph::{Graph, GraphError};
use crate::{Dim, Fact, Tensor};

/// softmax(scale · q kᵀ + bias) v. q [b, h, s, d], k and v [b, g, t, d] with g a divisor of h, perhaps a bias
/// [1, h or 1, s, t] → [b, h, s, d].
#[derive(Debug, Clone, PartialEq)]
pub struct ScaledDotProductAttention {
    /// Factor of the scores.
    pub scale: f32,
}

impl ScaledDotProductAttention {
    pub(crate) fn parse(attributes: &Attributes) -> Result<ScaledDotProductAttention, OpError> {
        attributes.expect_only(&["scale"])?;
        Ok(ScaledDotProductAttention { scale: attributes.float("scale")? })
    }

    /// The same in other ops: heads that share keys have an axis of their own.
    fn definition(&self, inputs: &[Fact]) -> Result<Graph, GraphError> {
        let mut graph = Graph::new("ScaledDotProductAttention");
        let g = &mut graph;
        let names = ["q", "k", "v"];
        let [q, k, v] = [0, 1, 2].map(|i| g.input(names[i], inputs[i].clone()));
        let bias = inputs.get(3).map(|bias| (g.input("bias", bias.clone()), &bias.shape[..]));
        let ([batch, n_heads, len, dim], [_, n_kv_heads, n_keys, _]) =
            (&inputs[0].shape[..], &inputs[1].shape[..])
        else {
            return Err(g.broken("inputs of rank 4".into()));
        };
        let (one, shared) = (Dim::from(1), shared_by(n_heads, n_kv_heads).unwrap_or(1));
        let groups = [batch.clone(), n_kv_heads.clone()];
        let keys = [&groups[..], &[one.clone(), n_keys.clone(), dim.clone()]].concat();
        let by_group = [&groups[..], &[Dim::from(shared), len.clone(), dim.clone()]].concat();
        let q = g.add("q_groups", Reshape { shape: by_group }, &[q])?;
        let k = g.add("k_groups", Reshape { shape: keys.clone() }, &[k])?;
        let v = g.add("v_groups", Reshape { shape: keys }, &[v])?;
        let columns = g.add("columns", Transpose { permutation: vec![0, 1, 2, 4, 3] }, &[k])?;
        let q = scaled(g, q, self.scale)?;
        let mut scores = g.add("scores", MatMul, &[q, columns])?;
        if let Some((bias, [_, bias_heads, ..])) = bias {
            let heads = match bias_heads.known() {
                Some(1) => [one.clone(), one.clone()],
                _ => [n_kv_heads.clone(), Dim::from(shared)],
            };
            let shape = [&[one][..], &heads, &[len.clone(), n_keys.clone()]].concat();
            let bias = g.add("bias_groups", Reshape { shape }, &[bias])?;
            scores = g.add("biased", Add, &[scores, bias])?;
        }
        let weights = g.add("weights", Softmax, &[scores])?;
        let mixed = g.add("mixed", MatMul, &[weights, v])?;
        let y = g.add("y", Reshape { shape: inputs[0].shape.clone() }, &[mixed])?;
        graph.output("y", y);
        Ok(graph)
    }
}

/// Query heads that share a key head.
fn shared_by(n_heads: &Dim, n_kv_heads: &Dim) -> Option<usize> {
    let (n_heads, n_kv_heads) = (n_heads.known()?, n_kv_heads.known()?);
    (n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads)).then(|| n_heads / n_kv_heads)
}

impl Operator for ScaledDotProductAttention {
    fn name(&self) -> &'static str {
        "ScaledDotProductAttention"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("scale", self.scale)
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "Attention",
            attributes: self.attributes(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, inputs.len().clamp(3, 4))?;
        for (index, role) in ["q", "k", "v", "bias"].into_iter().enumerate().take(inputs.len()) {
            expect_rank(inputs, index, role, 4)?;
        }
        let (q, k) = (&inputs[0].shape, &inputs[1].shape);
        if shared_by(&q[1], &k[1]).is_none() || q[0] != k[0] || q[3] != k[3] {
            let expected = "as many batches and dimensions as q, and a divisor of its heads";
            return Err(input_error(1, "k", &expected, &inputs[1]));
        }
        expect_fact(inputs, 2, "v", &inputs[1])?;
        if let Some(bias) = inputs.get(3) {
            let one = Dim::from(1);
            let heads = if bias.shape[1] == one { one.clone() } else { q[1].clone() };
            let expected = Fact::f32([one, heads, q[2].clone(), k[2].clone()]);
            expect_fact(inputs, 3, "bias", &expected)?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        self.infer(&facts)?;
        let failed =
            |error: GraphError| OpError::Body { op: self.name(), reason: error.to_string() };
        let body = self.definition(&facts).map_err(failed)?;
        crate::evaluate(&body, inputs).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_share_keys_and_have_their_own_bias() {
        let op = ScaledDotProductAttention { scale: 1.0 };
        let q = Tensor::f32(&[1, 2, 1, 1], vec![1.0, 1.0]).unwrap();
        let k = Tensor::f32(&[1, 1, 2, 1], vec![0.0, 0.0]).unwrap();
        let v = Tensor::f32(&[1, 1, 2, 1], vec![1.0, 3.0]).unwrap();
        let bias = Tensor::f32(&[1, 2, 1, 2], vec![0.0, 0.0, 0.0, -1e4]).unwrap();
        let y = op.evaluate(&[q.clone(), k.clone(), v.clone(), bias]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [2.0, 1.0]);
        let bias = Tensor::f32(&[1, 1, 1, 2], vec![-1e4, 0.0]).unwrap();
        let y = op.evaluate(&[q, k, v, bias]).unwrap();
        assert_eq!(y[0].to_f32_vec().unwrap(), [3.0, 3.0]);
    }

    #[test]
    fn key_heads_divide_query_heads() {
        let infer = |heads, kv_heads| {
            let fact = |heads: usize, len: usize| Fact::f32([1, heads, len, 4]);
            let bias = Fact::f32([1, 1, 2, 3]);
            let op = ScaledDotProductAttention { scale: 1.0 };
            op.infer(&[fact(heads, 2), fact(kv_heads, 3), fact(kv_heads, 3), bias])
        };
        assert!(infer(4, 2).is_ok());
        assert!(infer(4, 3).is_err());
    }
}
