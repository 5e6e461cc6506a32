//! A restricted pickle machine: tensors and containers only, nothing is ever called.
//!
//! Opcodes and their effects follow CPython's `pickletools`; globals are an allow-list
//! ([`Global`]). Values live in an arena, so no input nests deep enough to exhaust the stack,
//! and every opcode costs a bounded amount of memory.

use std::collections::HashMap;

use flamingo_ir::DType;

use super::{error::PickleError, view::View};

/// Bytes of a pickle; those of the largest checkpoints are below 10 MiB.
pub(super) const MAX_PICKLE_BYTES: usize = 16 << 20;
const MAX_NODES: usize = 4 << 20;
const MAX_TENSORS: usize = 1 << 18;
/// PyTorch's own limit.
const MAX_RANK: usize = 64;

/// Whose classes a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// `torch.save`.
    Torch,
    /// `torch.jit.save`: classes below `__torch__` are inert containers of attributes.
    TorchScript,
}

/// The result: an arena and the value on top of the stack at STOP.
#[derive(Debug)]
pub(super) struct Unpickled<'a> {
    pub(super) nodes: Vec<Node<'a>>,
    pub(super) root: Value<'a>,
}

/// A value; containers and tensors are indices into the arena.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    /// Floats, bytes, None and other things that a checkpoint may carry and nobody reads.
    Inert,
    Bool,
    Int(i64),
    Str(&'a str),
    Global(Global<'a>),
    Node(usize),
}

/// A container or tensor of the arena.
#[derive(Debug)]
pub(super) enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    /// Lists and sets.
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// An instance of an inert class, and the state it was built with.
    Object(Option<Value<'a>>),
    Storage(StorageRef<'a>),
    Tensor(TensorRef<'a>),
}

/// A storage of the archive.
#[derive(Clone, Copy, Debug)]
pub(super) struct StorageRef<'a> {
    /// Name of the entry below `data/`.
    pub(super) key: &'a str,
    /// Element type; bytes for untyped storages.
    pub(super) element: Element<'a>,
    /// Elements.
    pub(super) len: usize,
}

/// A tensor: a view of a storage.
#[derive(Debug)]
pub(super) struct TensorRef<'a> {
    pub(super) storage: StorageRef<'a>,
    /// Element type; differs from the storage's where that is untyped.
    pub(super) element: Element<'a>,
    pub(super) view: View,
}

/// An element type, by PyTorch's name where [`DType`] lacks it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Element<'a> {
    Known(DType),
    Unsupported(&'a str),
}

/// The globals that may occur.
#[derive(Clone, Copy, Debug)]
pub(super) enum Global<'a> {
    /// `collections.OrderedDict` and other mappings.
    Mapping,
    /// An inert class: TorchScript modules, `argparse.Namespace`.
    Class,
    /// A function that gives back its first argument, or a class of which that is enough.
    First,
    /// A function or class whose result nobody reads.
    Inert,
    /// `torch._utils._rebuild_tensor` and its later versions 2 and 3.
    RebuildTensor {
        typed: bool,
    },
    Storage(Element<'a>),
    Element(Element<'a>),
}

/// An error and the offset of its opcode, in bytes.
pub(super) type Failure = (usize, PickleError);

/// Runs the pickle in `bytes`, which is at most [`MAX_PICKLE_BYTES`] long.
pub(super) fn unpickle(bytes: &[u8], dialect: Dialect) -> Result<Unpickled<'_>, Failure> {
    let mut machine = Machine {
        bytes,
        at: 0,
        dialect,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        n_tensors: 0,
    };
    if bytes.len() > MAX_PICKLE_BYTES {
        return Err((0, PickleError::Limit { what: "bytes of pickle", limit: MAX_PICKLE_BYTES }));
    }
    loop {
        let offset = machine.at;
        if let Some(root) = machine.step().map_err(|error| (offset, error))? {
            return Ok(Unpickled { nodes: machine.nodes, root });
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    dialect: Dialect,
    stack: Vec<Value<'a>>,
    /// Stack heights at the open MARKs.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    nodes: Vec<Node<'a>>,
    n_tensors: usize,
}

type Step<T> = Result<T, PickleError>;

impl<'a> Machine<'a> {
    /// Executes one opcode; the final value at STOP.
    fn step(&mut self) -> Step<Option<Value<'a>>> {
        match self.byte()? {
            b'.' => return self.pop().map(Some),
            // Framing and versions.
            0x80 => self.skip(1)?,
            0x95 => self.skip(8)?,
            // Scalars.
            b'N' | b')' | b']' | b'}' | 0x8f | 0x88 | 0x89 => self.constant()?,
            b'K' => self.int(1)?,
            b'M' => self.int(2)?,
            b'J' => self.int(4)?,
            0x8a => self.long()?,
            0x8b => self.inert(4)?,
            b'G' => self.float()?,
            // Strings and bytes.
            0x8c => self.string(1)?,
            b'X' => self.string(4)?,
            0x8d => self.string(8)?,
            b'U' | b'C' => self.inert(1)?,
            b'T' | b'B' => self.inert(4)?,
            0x8e | 0x96 => self.inert(8)?,
            // Stack and memo.
            b'(' => self.marks.push(self.stack.len()),
            b'0' => self.discard()?,
            b'1' => self.discard_marked()?,
            b'2' => self.duplicate()?,
            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            0x94 => self.memoize()?,
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,
            // Containers.
            b't' => self.tuple_marked()?,
            count @ 0x85..=0x87 => self.tuple(usize::from(count - 0x84))?,
            b'a' => self.append_one()?,
            b'e' | 0x90 => self.append_marked()?,
            b's' => self.set_item()?,
            b'u' => self.set_items()?,
            // Globals, instances and tensors.
            b'c' => self.global()?,
            0x93 => self.stack_global()?,
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            0x81 => self.new_object()?,
            b'b' => self.build()?,
            opcode => return Err(PickleError::Opcode { opcode }),
        }
        Ok(None)
    }

    fn take(&mut self, count: usize) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let truncated = PickleError::Truncated { needed: count, left: rest.len() };
        let taken = rest.get(..count).ok_or(truncated)?;
        self.at += count;
        Ok(taken)
    }

    fn skip(&mut self, count: usize) -> Step<()> {
        self.take(count).map(|_| ())
    }

    fn float(&mut self) -> Step<()> {
        self.skip(8)?;
        self.stack.push(Value::Inert);
        Ok(())
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned little-endian number of `width` ≤ 8 bytes.
    fn number(&mut self, width: usize) -> Step<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// As many bytes as a number of `width` bytes says.
    fn counted(&mut self, width: usize) -> Step<&'a [u8]> {
        let count = self.number(width)?;
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn constant(&mut self) -> Step<()> {
        let value = match self.bytes[self.at - 1] {
            b'N' => Value::Inert,
            b')' => self.node(Node::Tuple(Vec::new()))?,
            b'}' => self.node(Node::Dict(Vec::new()))?,
            b']' | 0x8f => self.node(Node::List(Vec::new()))?,
            _ => Value::Bool,
        };
        self.stack.push(value);
        Ok(())
    }

    /// An integer of `width` bytes; only those of 4 are signed.
    fn int(&mut self, width: usize) -> Step<()> {
        let bytes = self.take(width)?;
        let value = match bytes {
            [a, b, c, d] => i64::from(i32::from_le_bytes([*a, *b, *c, *d])),
            _ => bytes.iter().rev().fold(0, |number, byte| number << 8 | i64::from(*byte)),
        };
        self.stack.push(Value::Int(value));
        Ok(())
    }

    /// A two's complement integer of any width; nobody reads those wider than 8 bytes.
    fn long(&mut self) -> Step<()> {
        let bytes = self.counted(1)?;
        let fill = if bytes.last().is_some_and(|byte| *byte >= 0x80) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        self.stack.push(match wide.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(wide))
            }
            None => Value::Inert,
        });
        Ok(())
    }

    fn inert(&mut self, width: usize) -> Step<()> {
        self.counted(width)?;
        self.stack.push(Value::Inert);
        Ok(())
    }

    fn string(&mut self, width: usize) -> Step<()> {
        let text = utf8(self.counted(width)?)?;
        self.stack.push(Value::Str(text));
        Ok(())
    }

    /// Pops within the innermost MARK: what lies below one is out of reach.
    fn pop(&mut self) -> Step<Value<'a>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let missing = PickleError::Operand { expected: "a value", found: "an empty stack" };
        if self.stack.len() <= floor {
            return Err(missing);
        }
        self.stack.pop().ok_or(missing)
    }

    fn top(&self) -> Step<Value<'a>> {
        let missing = PickleError::Operand { expected: "a value", found: "an empty stack" };
        self.stack.last().copied().ok_or(missing)
    }

    fn pop_marked(&mut self) -> Step<Vec<Value<'a>>> {
        let missing = PickleError::Operand { expected: "a MARK", found: "none" };
        let height = self.marks.pop().ok_or(missing)?;
        Ok(self.stack.split_off(height))
    }

    fn discard(&mut self) -> Step<()> {
        self.pop().map(|_| ())
    }

    fn discard_marked(&mut self) -> Step<()> {
        self.pop_marked().map(|_| ())
    }

    fn duplicate(&mut self) -> Step<()> {
        self.stack.push(self.top()?);
        Ok(())
    }

    fn put(&mut self, width: usize) -> Step<()> {
        let slot = self.slot(width)?;
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn memoize(&mut self) -> Step<()> {
        let limit = MAX_PICKLE_BYTES;
        let full = |_| PickleError::Limit { what: "memo slots", limit };
        let slot = u32::try_from(self.memo.len()).map_err(full)?;
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn get(&mut self, width: usize) -> Step<()> {
        let slot = self.slot(width)?;
        let value = self.memo.get(&slot).copied().ok_or(PickleError::Memo { slot })?;
        self.stack.push(value);
        Ok(())
    }

    fn slot(&mut self, width: usize) -> Step<u32> {
        let limit = MAX_PICKLE_BYTES;
        let too_large = |_| PickleError::Limit { what: "memo slots", limit };
        u32::try_from(self.number(width)?).map_err(too_large)
    }

    fn node(&mut self, node: Node<'a>) -> Step<Value<'a>> {
        if self.nodes.len() >= MAX_NODES {
            return Err(PickleError::Limit { what: "containers and tensors", limit: MAX_NODES });
        }
        self.nodes.push(node);
        Ok(Value::Node(self.nodes.len() - 1))
    }

    fn tuple(&mut self, count: usize) -> Step<()> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        let value = self.node(Node::Tuple(items))?;
        self.stack.push(value);
        Ok(())
    }

    fn tuple_marked(&mut self) -> Step<()> {
        let items = self.pop_marked()?;
        let value = self.node(Node::Tuple(items))?;
        self.stack.push(value);
        Ok(())
    }

    fn append_one(&mut self) -> Step<()> {
        let item = self.pop()?;
        self.append(vec![item])
    }

    fn append_marked(&mut self) -> Step<()> {
        let items = self.pop_marked()?;
        self.append(items)
    }

    /// Appends to the list on top of the stack.
    fn append(&mut self, items: Vec<Value<'a>>) -> Step<()> {
        let target = self.top()?;
        match self.node_mut(target) {
            Some(Node::List(list)) => list.extend(items),
            Some(_) => return Err(operand("a list", self.kind(target))),
            None if matches!(target, Value::Inert) => {}
            None => return Err(operand("a list", self.kind(target))),
        }
        Ok(())
    }

    fn set_item(&mut self) -> Step<()> {
        let value = self.pop()?;
        let key = self.pop()?;
        self.insert([(key, value)])
    }

    fn set_items(&mut self) -> Step<()> {
        let items = self.pop_marked()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(operand("keys and values in pairs", "an odd number of values"));
        }
        self.insert(pairs.iter().map(|[key, value]| (*key, *value)))
    }

    /// Adds to the mapping on top of the stack.
    fn insert(&mut self, pairs: impl IntoIterator<Item = (Value<'a>, Value<'a>)>) -> Step<()> {
        let target = self.top()?;
        match self.node_mut(target) {
            Some(Node::Dict(dict)) => dict.extend(pairs),
            _ => return Err(operand("a dict", self.kind(target))),
        }
        Ok(())
    }

    fn global(&mut self) -> Step<()> {
        let module = self.line()?;
        let name = self.line()?;
        self.push_global(module, name)
    }

    fn stack_global(&mut self) -> Step<()> {
        let name = self.pop()?;
        let module = self.pop()?;
        match (module, name) {
            (Value::Str(module), Value::Str(name)) => self.push_global(module, name),
            (Value::Str(_), other) | (other, _) => Err(operand("a string", self.kind(other))),
        }
    }

    fn push_global(&mut self, module: &'a str, name: &'a str) -> Step<()> {
        let forbidden = || PickleError::Global { name: shorten(&format!("{module}.{name}")) };
        let global = global(self.dialect, module, name).ok_or_else(forbidden)?;
        self.stack.push(Value::Global(global));
        Ok(())
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.bytes[self.at..];
        let truncated = PickleError::Truncated { needed: rest.len() + 1, left: rest.len() };
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or(truncated)?;
        self.at += end + 1;
        utf8(&rest[..end])
    }

    /// `("storage", storage class, key, device, number of elements)`.
    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let [
            Value::Str("storage"),
            Value::Global(Global::Storage(element)),
            Value::Str(key),
            _,
            len,
            ..,
        ] = *self.tuple_of(id)?
        else {
            return Err(operand("the persistent id of a storage", "another tuple"));
        };
        let storage = StorageRef { key, element, len: self.size(len)? };
        let value = self.node(Node::Storage(storage))?;
        self.stack.push(value);
        Ok(())
    }

    fn reduce(&mut self) -> Step<()> {
        let arguments = self.pop()?;
        let callable = self.pop()?;
        let Value::Global(global) = callable else {
            return Err(operand("an allowed global", self.kind(callable)));
        };
        let value = match global {
            Global::Mapping => self.node(Node::Dict(Vec::new()))?,
            Global::Class => self.node(Node::Object(None))?,
            Global::Inert => Value::Inert,
            Global::First => match self.tuple_of(arguments)?.first() {
                Some(first) => *first,
                None => Value::Inert,
            },
            Global::RebuildTensor { typed } => self.tensor(arguments, typed)?,
            Global::Storage(_) | Global::Element(_) => {
                return Err(operand("a function or container class", "a storage class or dtype"));
            }
        };
        self.stack.push(value);
        Ok(())
    }

    /// `(storage, offset, sizes, strides, …)`; version 3 has the dtype as seventh.
    fn tensor(&mut self, arguments: Value<'a>, typed: bool) -> Step<Value<'a>> {
        self.n_tensors += 1;
        if self.n_tensors > MAX_TENSORS {
            return Err(PickleError::Limit { what: "tensors", limit: MAX_TENSORS });
        }
        let arguments = self.tuple_of(arguments)?;
        let [Value::Node(storage), offset, sizes, strides, ..] = *arguments else {
            return Err(operand("storage, offset, sizes and strides", "another tuple"));
        };
        let element = arguments.get(6).copied();
        let Node::Storage(storage) = self.nodes[storage] else {
            return Err(operand("a storage", self.kind(Value::Node(storage))));
        };
        let element = match (typed, element) {
            (false, _) => storage.element,
            (true, Some(Value::Global(Global::Element(element)))) => element,
            (true, _) => return Err(operand("a dtype", "another value")),
        };
        let view = View {
            offset: self.size(offset)?,
            shape: self.sizes(sizes)?,
            strides: self.sizes(strides)?,
        };
        if view.shape.len() != view.strides.len() {
            return Err(operand("as many strides as sizes", "another number"));
        }
        self.node(Node::Tensor(TensorRef { storage, element, view }))
    }

    fn new_object(&mut self) -> Step<()> {
        let arguments = self.pop()?;
        self.tuple_of(arguments)?;
        let class = self.pop()?;
        let value = match class {
            Value::Global(Global::Mapping) => self.node(Node::Dict(Vec::new()))?,
            Value::Global(Global::Class) => self.node(Node::Object(None))?,
            Value::Global(Global::Inert) => Value::Inert,
            other => return Err(operand("a container class", self.kind(other))),
        };
        self.stack.push(value);
        Ok(())
    }

    /// Gives an object its attributes; those of mappings (`_metadata`) are of no interest.
    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = self.top()?;
        match self.node_mut(target) {
            Some(Node::Object(Some(_))) => Err(operand("one state per object", "a second one")),
            Some(Node::Object(empty)) => {
                *empty = Some(state);
                Ok(())
            }
            Some(Node::Dict(_)) => Ok(()),
            None if matches!(target, Value::Inert) => Ok(()),
            _ => Err(operand("an object", self.kind(target))),
        }
    }

    fn node_mut(&mut self, value: Value<'a>) -> Option<&mut Node<'a>> {
        match value {
            Value::Node(node) => self.nodes.get_mut(node),
            _ => None,
        }
    }

    fn tuple_of(&self, value: Value<'a>) -> Step<&[Value<'a>]> {
        match value {
            Value::Node(node) => match &self.nodes[node] {
                Node::Tuple(items) => Ok(items),
                _ => Err(operand("a tuple", self.kind(value))),
            },
            _ => Err(operand("a tuple", self.kind(value))),
        }
    }

    fn size(&self, value: Value<'a>) -> Step<usize> {
        match value {
            Value::Int(size) => {
                usize::try_from(size).map_err(|_| operand("a size", "a negative number"))
            }
            other => Err(operand("a size", self.kind(other))),
        }
    }

    fn sizes(&self, value: Value<'a>) -> Step<Vec<usize>> {
        let items = self.tuple_of(value)?;
        if items.len() > MAX_RANK {
            return Err(PickleError::Limit { what: "dimensions", limit: MAX_RANK });
        }
        items.iter().map(|item| self.size(*item)).collect()
    }

    fn kind(&self, value: Value<'a>) -> &'static str {
        kind(&self.nodes, value)
    }
}

/// What a value is, for messages.
pub(super) fn kind(nodes: &[Node<'_>], value: Value<'_>) -> &'static str {
    match value {
        Value::Inert => "a value that is not read",
        Value::Bool => "a truth value",
        Value::Int(_) => "an integer",
        Value::Str(_) => "a string",
        Value::Global(_) => "a global",
        Value::Node(node) => match &nodes[node] {
            Node::Tuple(_) => "a tuple",
            Node::List(_) => "a list",
            Node::Dict(_) => "a dict",
            Node::Object(_) => "an object",
            Node::Storage(_) => "a storage",
            Node::Tensor(_) => "a tensor",
        },
    }
}

/// The allow-list.
fn global<'a>(dialect: Dialect, module: &'a str, name: &'a str) -> Option<Global<'a>> {
    Some(match (module, name) {
        ("collections", "OrderedDict" | "defaultdict" | "Counter") => Global::Mapping,
        ("argparse", "Namespace") => Global::Class,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => {
            Global::RebuildTensor { typed: false }
        }
        ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensor { typed: true },
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Global::First,
        ("torch", "Size") => Global::First,
        ("torch", "device") | ("_codecs", "encode") => Global::Inert,
        ("torch", _) => match name.strip_suffix("Storage") {
            Some(element) => Global::Storage(storage_element(element)?),
            None => Global::Element(dtype_element(name)?),
        },
        ("torch.storage", "UntypedStorage") => Global::Storage(Element::Known(DType::U8)),
        ("__builtin__" | "builtins", "set" | "frozenset") => Global::First,
        (
            "__builtin__" | "builtins",
            "int" | "long" | "float" | "bool" | "str" | "list" | "dict",
        ) => Global::Inert,
        _ if dialect == Dialect::TorchScript => return torchscript_global(module, name),
        _ => return None,
    })
}

fn torchscript_global<'a>(module: &str, name: &str) -> Option<Global<'a>> {
    match (module, name) {
        (
            "torch.jit._pickle",
            "build_intlist" | "build_tensorlist" | "build_doublelist" | "build_boollist"
            | "restore_type_tag",
        ) => Some(Global::First),
        _ if module == "__torch__" || module.starts_with("__torch__.") => Some(Global::Class),
        _ => None,
    }
}

/// Element type of `torch.<name>Storage`.
fn storage_element(name: &str) -> Option<Element<'_>> {
    Some(Element::Known(match name {
        "Double" => DType::F64,
        "Float" => DType::F32,
        "Half" => DType::F16,
        "BFloat16" => DType::BF16,
        "Long" => DType::I64,
        "Int" => DType::I32,
        "Short" => DType::I16,
        "Char" => DType::I8,
        "Byte" | "Untyped" => DType::U8,
        "Bool" => DType::Bool,
        "ComplexFloat" | "ComplexDouble" | "QInt8" | "QUInt8" | "QInt32" => {
            return Some(Element::Unsupported(name));
        }
        _ => return None,
    }))
}

/// Element type `torch.<name>`.
fn dtype_element(name: &str) -> Option<Element<'_>> {
    Some(Element::Known(match name {
        "float64" => DType::F64,
        "float32" => DType::F32,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        "int64" => DType::I64,
        "int32" => DType::I32,
        "int16" => DType::I16,
        "int8" => DType::I8,
        "uint8" => DType::U8,
        "bool" => DType::Bool,
        "uint16" | "uint32" | "uint64" | "complex32" | "complex64" | "complex128"
        | "float8_e4m3fn" | "float8_e5m2" | "float8_e4m3fnuz" | "float8_e5m2fnuz"
        | "float8_e8m0fnu" | "float4_e2m1fn_x2" => return Some(Element::Unsupported(name)),
        _ => return None,
    }))
}

/// The first hundred characters of text from a file, for messages.
pub(super) fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(100).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

fn utf8(bytes: &[u8]) -> Step<&str> {
    std::str::from_utf8(bytes).map_err(|_| operand("text in UTF-8", "other bytes"))
}

fn operand(expected: &'static str, found: &'static str) -> PickleError {
    PickleError::Operand { expected, found }
}
