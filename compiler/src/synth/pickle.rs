//! The pickle inside a PyTorch checkpoint: an ordered dictionary of tensors, opcode for opcode
//! what `torch.save` writes (pickle protocol 2).

use super::tensor::TensorSpec;

/// Python's pickler writes this many dictionary items per `SETITEMS`.
const BATCH: usize = 1000;

/// The bytes of `data.pkl` for f32 tensors, tensor `i` with its values in `data/{i}`.
pub(super) fn state_dict(specs: &[TensorSpec]) -> Vec<u8> {
    dict(specs, |pickler, idx, spec| {
        let whole = Storage { idx, n_values: spec.n_values() };
        pickler.tensor(whole, spec, &strides(&spec.shape));
    })
}

/// The same for tensors without values of their own: each shows one number of `data/0` everywhere, as
/// `torch.tensor(x).expand(shape)` does.
pub(super) fn outline(specs: &[TensorSpec]) -> Vec<u8> {
    dict(specs, |pickler, _, spec| {
        pickler.tensor(Storage { idx: 0, n_values: 1 }, spec, &vec![0; spec.shape.len()]);
    })
}

fn dict(specs: &[TensorSpec], tensor: impl Fn(&mut Pickler, usize, &TensorSpec)) -> Vec<u8> {
    let mut pickler = Pickler::default();
    pickler.bytes.extend([0x80, 2]);
    pickler.ordered_dict();
    for (batch_idx, batch) in specs.chunks(BATCH).enumerate() {
        pickler.bytes.push(b'(');
        for (idx, spec) in batch.iter().enumerate() {
            pickler.string(&spec.name);
            tensor(&mut pickler, batch_idx * BATCH + idx, spec);
        }
        pickler.bytes.push(b'u');
    }
    pickler.bytes.push(b'.');
    pickler.bytes
}

/// A run of numbers, `data/{idx}` of the archive.
struct Storage {
    idx: usize,
    n_values: usize,
}

/// Objects that occur again are written once and fetched by their number afterwards.
#[derive(Default)]
struct Pickler {
    bytes: Vec<u8>,
    n_memo: u32,
    known: Vec<(&'static str, u32)>,
}

impl Pickler {
    /// `_rebuild_tensor_v2(persistent id, offset, shape, strides, requires_grad, hooks)`.
    fn tensor(&mut self, storage: Storage, spec: &TensorSpec, strides: &[usize]) {
        self.known("torch._utils _rebuild_tensor_v2", Self::global);
        self.bytes.extend(*b"((");
        self.known("storage", Self::string);
        self.known("torch FloatStorage", Self::global);
        self.string(&storage.idx.to_string());
        self.known("cpu", Self::string);
        self.integer(storage.n_values);
        self.bytes.push(b't');
        self.memoize();
        self.bytes.push(b'Q');
        self.integer(0);
        self.tuple(&spec.shape);
        self.tuple(strides);
        self.bytes.push(0x89);
        self.ordered_dict();
        self.bytes.push(b't');
        self.memoize();
        self.bytes.push(b'R');
        self.memoize();
    }

    fn ordered_dict(&mut self) {
        self.known("collections OrderedDict", Self::global);
        self.bytes.extend(*b")R");
        self.memoize();
    }

    fn known(&mut self, object: &'static str, write: fn(&mut Self, &str)) {
        match self.known.iter().find(|(name, _)| *name == object) {
            Some(&(_, number)) => self.memo_op(b'h', b'j', number),
            None => {
                self.known.push((object, self.n_memo));
                write(self, object);
            }
        }
    }

    fn global(&mut self, module_and_name: &str) {
        self.bytes.push(b'c');
        self.bytes.extend(module_and_name.replace(' ', "\n").as_bytes());
        self.bytes.push(b'\n');
        self.memoize();
    }

    fn string(&mut self, text: &str) {
        self.bytes.push(b'X');
        self.bytes.extend((text.len() as u32).to_le_bytes());
        self.bytes.extend(text.as_bytes());
        self.memoize();
    }

    fn tuple(&mut self, items: &[usize]) {
        if items.len() > 3 {
            self.bytes.push(b'(');
        }
        for &item in items {
            self.integer(item);
        }
        match items.len() {
            0 => return self.bytes.push(b')'),
            1 => self.bytes.push(0x85),
            2 => self.bytes.push(0x86),
            3 => self.bytes.push(0x87),
            _ => self.bytes.push(b't'),
        }
        self.memoize();
    }

    fn integer(&mut self, number: usize) {
        let le = (number as u64).to_le_bytes();
        match number {
            0..=0xff => self.bytes.extend([b'K', le[0]]),
            0x100..=0xffff => self.bytes.extend([b'M', le[0], le[1]]),
            0x1_0000..=0x7fff_ffff => {
                self.bytes.push(b'J');
                self.bytes.extend(&le[..4]);
            }
            _ => {
                // Two's complement: one byte more than the bits need, for the sign.
                let n_bytes = (u64::BITS - (number as u64).leading_zeros()) as usize / 8 + 1;
                self.bytes.extend([0x8a, n_bytes as u8]);
                self.bytes.extend(le.iter().chain(&[0]).take(n_bytes));
            }
        }
    }

    fn memoize(&mut self) {
        self.memo_op(b'q', b'r', self.n_memo);
        self.n_memo += 1;
    }

    fn memo_op(&mut self, short: u8, long: u8, number: u32) {
        match u8::try_from(number) {
            Ok(number) => self.bytes.extend([short, number]),
            Err(_) => {
                self.bytes.push(long);
                self.bytes.extend(number.to_le_bytes());
            }
        }
    }
}

/// Strides of a row-major tensor, in values.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for idx in (1..shape.len()).rev() {
        strides[idx - 1] = strides[idx] * shape[idx];
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::tensor::{Fill, TensorList};

    /// `torch.save(OrderedDict([("conv.weight", zeros(2,3,4,5)), ("g", zeros(1)),
    /// ("w", zeros(300,1000)), ("s", zeros(()))]))`, its `data.pkl` with PyTorch 2.15.
    const TORCH: &str = "\
        800263636f6c6c656374696f6e730a4f726465726564446963740a71002952710128580b000000636f6e762e\
        776569676874710263746f7263682e5f7574696c730a5f72656275696c645f74656e736f725f76320a710328\
        28580700000073746f72616765710463746f7263680a466c6f617453746f726167650a710558010000003071\
        06580300000063707571074b78747108514b00284b024b034b044b05747109284b3c4b144b054b0174710a89\
        68002952710b74710c52710d580100000067710e6803282868046805580100000031710f68074b0174711051\
        4b004b018571114b018571128968002952711374711452711558010000007771166803282868046805580100\
        000032711768074ae0930400747118514b004d2c014de8038671194de8034b0186711a8968002952711b7471\
        1c52711d580100000073711e6803282868046805580100000033711f68074b01747120514b00292989680029\
        527121747122527123752e";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn pickle_is_byte_for_byte_that_of_pytorch() {
        let mut list = TensorList::default();
        list.add("conv.weight", &[2, 3, 4, 5], Fill::Linear);
        list.add("g", &[1], Fill::Gate);
        list.add("w", &[300, 1000], Fill::Linear);
        list.add("s", &[], Fill::Bias);
        assert_eq!(hex(&state_dict(list.specs())), TORCH);
    }

    #[test]
    fn integers_are_as_short_as_python_writes_them() {
        let cases: [(usize, &str); 6] = [
            (255, "4bff"),
            (65_535, "4dffff"),
            (65_536, "4a00000100"),
            (0x7fff_ffff, "4affffff7f"),
            (0x8000_0000, "8a050000008000"),
            (0x1_2345_6789, "8a058967452301"),
        ];
        for (number, expected) in cases {
            let mut pickler = Pickler::default();
            pickler.integer(number);
            assert_eq!(hex(&pickler.bytes), expected, "{number}");
        }
    }
}
