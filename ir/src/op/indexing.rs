//! Ops that pick elements: `Gather Slice Split Where`
//! (<https://onnx.ai/onnx/operators/>, opset 13).

use ndarray::{Axis, IxDyn};

use super::broadcast::broadcast;
use super::{Attributes, OnnxForm, OnnxInput, OpError, Operator, expect_inputs, input_error};
use crate::tensor::on_any;
use crate::{DType, Dim, Fact, Tensor};

/// Rows of the first input by the indices of the second (axis 0).
#[derive(Debug, Clone, PartialEq)]
pub struct Gather;

/// Positions `start..end` of an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// The axis.
    pub axis: usize,
    /// First position.
    pub start: usize,
    /// Position after the last.
    pub end: usize,
}

/// Consecutive parts of an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// The axis.
    pub axis: usize,
    /// Size of each part.
    pub sizes: Vec<usize>,
}

/// The second input where the first is true, else the third.
#[derive(Debug, Clone, PartialEq)]
pub struct Where;

impl Gather {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Gather, OpError> {
        attributes.expect_only(&[]).map(|()| Gather)
    }
}

impl Where {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Where, OpError> {
        attributes.expect_only(&[]).map(|()| Where)
    }
}

impl Slice {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Slice, OpError> {
        attributes.expect_only(&["axis", "start", "end"])?;
        let size = |name| attributes.size(name);
        Ok(Slice { axis: size("axis")?, start: size("start")?, end: size("end")? })
    }
}

impl Split {
    pub(crate) fn parse(attributes: &Attributes) -> Result<Split, OpError> {
        attributes.expect_only(&["axis", "sizes"])?;
        Ok(Split { axis: attributes.size("axis")?, sizes: attributes.sizes("sizes")? })
    }
}

fn to_i64(size: usize) -> i64 {
    i64::try_from(size).expect("sizes in graphs are below 2^31")
}

impl Operator for Gather {
    fn name(&self) -> &'static str {
        "Gather"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "Gather",
            attributes: Attributes::none().with("axis", 0),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 2)?;
        let [table, indices] = [&inputs[0], &inputs[1]];
        if table.rank() == 0 {
            return Err(input_error(0, "table", &"rank 1 or more", table));
        }
        if indices.dtype != DType::I64 {
            return Err(input_error(1, "indices", &DType::I64, indices));
        }
        let shape = [&indices.shape, &table.shape[1..]].concat();
        Ok(vec![Fact { dtype: table.dtype, shape }])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("Gather takes a table and i64 indices".into());
        let [table, Tensor::I64(indices)] = inputs else { return Err(failed()) };
        let n_rows = table.shape().first().copied().ok_or_else(failed)?;
        let row = |index: &i64| {
            let row = usize::try_from(*index).ok().filter(|row| *row < n_rows);
            row.ok_or_else(|| OpError::Evaluation(format!("index {index} outside 0..{n_rows}")))
        };
        let rows = indices.iter().map(row).collect::<Result<Vec<usize>, OpError>>()?;
        let shape = IxDyn(&[indices.shape(), &table.shape()[1..]].concat());
        let out = on_any!(table, t => {
            t.select(Axis(0), &rows).to_shape(shape).ok().map(|rows| rows.to_owned())
        });
        out.map(|t| vec![t]).ok_or_else(failed)
    }
}

/// Positions `start..end` of `axis`.
fn part(tensor: &Tensor, axis: usize, start: usize, end: usize) -> Tensor {
    let slice = ndarray::Slice::from(start..end);
    let out = on_any!(tensor, t => Some(t.slice_axis(Axis(axis), slice).to_owned()));
    out.expect("a part is always there")
}

impl Operator for Slice {
    fn name(&self) -> &'static str {
        "Slice"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("axis", self.axis).with("start", self.start).with("end", self.end)
    }

    fn onnx_form(&self) -> OnnxForm {
        let list = |value: usize| OnnxInput::I64(vec![to_i64(value)]);
        OnnxForm::Node {
            domain: "",
            op_type: "Slice",
            attributes: Attributes::none(),
            extra_inputs: vec![list(self.start), list(self.end), list(self.axis)],
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let size = inputs[0].shape.get(self.axis).and_then(Dim::known);
        match size {
            Some(size) if self.start <= self.end && self.end <= size => {
                let mut fact = inputs[0].clone();
                fact.shape[self.axis] = Dim::from(self.end - self.start);
                Ok(vec![fact])
            }
            _ => {
                let expected = format!("axis {} of size ≥ {}", self.axis, self.end);
                Err(input_error(0, "operand", &expected, &inputs[0]))
            }
        }
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        self.infer(&[inputs[0].fact()])?;
        Ok(vec![part(&inputs[0], self.axis, self.start, self.end)])
    }
}

impl Operator for Split {
    fn name(&self) -> &'static str {
        "Split"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none().with("axis", self.axis).with("sizes", self.sizes.as_slice())
    }

    fn onnx_form(&self) -> OnnxForm {
        let sizes = self.sizes.iter().map(|size| to_i64(*size)).collect();
        OnnxForm::Node {
            domain: "",
            op_type: "Split",
            attributes: Attributes::none().with("axis", self.axis),
            extra_inputs: vec![OnnxInput::I64(sizes)],
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 1)?;
        let total = self.sizes.iter().sum::<usize>();
        if inputs[0].shape.get(self.axis).and_then(Dim::known) != Some(total) {
            let expected = format!("axis {} of size {total}", self.axis);
            return Err(input_error(0, "operand", &expected, &inputs[0]));
        }
        let part = |size: &usize| {
            let mut fact = inputs[0].clone();
            fact.shape[self.axis] = Dim::from(*size);
            fact
        };
        Ok(self.sizes.iter().map(part).collect())
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        self.infer(&[inputs[0].fact()])?;
        let mut start = 0;
        let mut outputs = Vec::with_capacity(self.sizes.len());
        for size in &self.sizes {
            outputs.push(part(&inputs[0], self.axis, start, start + size));
            start += size;
        }
        Ok(outputs)
    }
}

impl Operator for Where {
    fn name(&self) -> &'static str {
        "Where"
    }

    fn attributes(&self) -> Attributes {
        Attributes::none()
    }

    fn onnx_form(&self) -> OnnxForm {
        OnnxForm::Node {
            domain: "",
            op_type: "Where",
            attributes: Attributes::none(),
            extra_inputs: Vec::new(),
            absent: &[],
        }
    }

    fn infer(&self, inputs: &[Fact]) -> Result<Vec<Fact>, OpError> {
        expect_inputs(inputs, 3)?;
        if inputs[0].dtype != DType::Bool {
            return Err(input_error(0, "condition", &DType::Bool, &inputs[0]));
        }
        if inputs[1].dtype != DType::F32 || inputs[2].dtype != DType::F32 {
            return Err(input_error(1, "choices", &DType::F32, &inputs[1]));
        }
        let choices = Fact::f32(broadcast(&inputs[1], &inputs[2])?);
        Ok(vec![Fact::f32(broadcast(&inputs[0], &choices)?)])
    }

    fn evaluate(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        let failed = || OpError::Evaluation("Where takes bool, f32, f32 that broadcast".into());
        let [Tensor::Bool(condition), Tensor::F32(yes), Tensor::F32(no)] = inputs else {
            return Err(failed());
        };
        let facts: Vec<Fact> = inputs.iter().map(Tensor::fact).collect();
        let shape = self.infer(&facts)?[0].known_shape().ok_or_else(failed)?;
        let condition = condition.broadcast(shape.clone()).ok_or_else(failed)?;
        let yes = yes.broadcast(shape.clone()).ok_or_else(failed)?;
        let no = no.broadcast(shape).ok_or_else(failed)?;
        let choose = |c: &bool, y: &f32, n: &f32| if *c { *y } else { *n };
        let out = ndarray::Zip::from(condition).and(yes).and(no).map_collect(choose);
        Ok(vec![Tensor::F32(out.into_shared())])
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    #[test]
    fn gather_rejects_rows_outside_the_table() {
        let table = Tensor::f32(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        let pick =
            |index| Gather.evaluate(&[table.clone(), Tensor::i64(&[1], vec![index]).unwrap()]);
        assert_eq!(pick(1).unwrap()[0].to_f32_vec().unwrap(), [3.0, 4.0]);
        assert!(pick(2).is_err());
        assert!(pick(-1).is_err());
    }

    #[test]
    fn split_cuts_what_slice_takes() {
        let x = Tensor::f32(&[2, 3], (0..6).map(|i| i as f32).collect()).unwrap();
        let parts = Split { axis: 1, sizes: vec![1, 2] }.evaluate(from_ref(&x)).unwrap();
        let slice = Slice { axis: 1, start: 1, end: 3 }.evaluate(from_ref(&x)).unwrap();
        assert_eq!(parts[1], slice[0]);
        assert!(Slice { axis: 1, start: 1, end: 4 }.infer(&[x.fact()]).is_err());
        assert!(Split { axis: 1, sizes: vec![1, 1] }.infer(&[x.fact()]).is_err());
    }
}
