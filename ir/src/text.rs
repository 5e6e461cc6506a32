//! Text form of graphs, for people, diffs and tests: one line a node.
//!
//! ```
//! use flamingo_ir::Graph;
//! let text = "\
//! graph example(%0 x: f32[text_len, 2]) -> (y: %3)
//!   %1: f32[3, 2] = weight \"lang.weight\"
//!   %2: f32[3] = literal [0.5, -1.0, 2.0]
//!   %3: f32[text_len, 3] = Linear(%0, %1, %2) {activation = \"none\", bias = 1, residual = 0, rounding = \"none\"} # head
//! ";
//! let graph = Graph::parse(text)?;
//! assert_eq!(graph.to_string(), text);
//! # Ok::<(), flamingo_ir::TextError>(())
//! ```
//!
//! Values are numbered in the order in which they print: inputs, then each node's constants
//! before it. Literals of more than 8 elements, and those with a NaN, print as `0x` and the hex
//! digits of their little-endian bytes. Constants that nothing reads do not print.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use crate::graph::{Constant, Graph, GraphError, ValueId};
use crate::op::{Attribute, Attributes, Op, OpError};
use crate::{DType, Dim, Fact, Tensor, TensorError};

/// Literals of up to this many elements print their values.
const MAX_PRINTED: usize = 8;

/// Why a text is no graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct TextError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: Box<TextProblem>,
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TextProblem {
    /// Not what the text form has here.
    #[error("expected {expected}, got `{found}`")]
    Syntax {
        /// What would fit.
        expected: String,
        /// What came.
        found: String,
    },
    /// The op does not exist or has other attributes.
    #[error(transparent)]
    Op(#[from] OpError),
    /// The op does not take these inputs.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut printer = Printer { graph: self, numbers: BTreeMap::new(), lines: String::new() };
        let inputs = self.inputs().iter().map(|(name, id)| {
            let number = printer.number(*id);
            format!("%{number} {name}: {}", self.fact(*id))
        });
        let inputs: Vec<String> = inputs.collect();
        printer.lines()?;
        let outputs = self.outputs().iter().map(|(name, id)| {
            let number = printer.number(*id);
            format!("{name}: %{number}")
        });
        let outputs: Vec<String> = outputs.collect();
        writeln!(f, "graph {}({}) -> ({})", self.name, inputs.join(", "), outputs.join(", "))?;
        f.write_str(&printer.lines)
    }
}

struct Printer<'a> {
    graph: &'a Graph,
    numbers: BTreeMap<ValueId, usize>,
    lines: String,
}

impl Printer<'_> {
    fn number(&mut self, id: ValueId) -> usize {
        let next = self.numbers.len();
        *self.numbers.entry(id).or_insert(next)
    }

    fn lines(&mut self) -> fmt::Result {
        let graph = self.graph;
        for node in graph.nodes() {
            for input in &node.inputs {
                self.constant(*input)?;
            }
            let results: Vec<String> = node.outputs.iter().map(|id| self.result(*id)).collect();
            let inputs: Vec<String> =
                node.inputs.iter().map(|id| format!("%{}", self.number(*id))).collect();
            let attributes = node.op.operator().attributes();
            let (results, op, inputs) = (results.join(", "), node.op.name(), inputs.join(", "));
            write!(self.lines, "  {results} = {op}({inputs})")?;
            if !attributes.0.is_empty() {
                write!(self.lines, " {attributes}")?;
            }
            writeln!(self.lines, " # {}", node.name)?;
        }
        graph.outputs().iter().try_for_each(|(_, id)| self.constant(*id))
    }

    fn result(&mut self, id: ValueId) -> String {
        format!("%{}: {}", self.number(id), self.graph.fact(id))
    }

    /// Prints a constant before its first reader.
    fn constant(&mut self, id: ValueId) -> fmt::Result {
        let Some(constant) = &self.graph.value(id).constant else { return Ok(()) };
        if self.numbers.contains_key(&id) {
            return Ok(());
        }
        let result = self.result(id);
        match constant {
            Constant::Weight(name) => writeln!(self.lines, "  {result} = weight {name:?}"),
            Constant::Literal(tensor) => {
                writeln!(self.lines, "  {result} = literal {}", literal(tensor))
            }
        }
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> =
            self.0.iter().map(|(name, value)| format!("{name} = {value}")).collect();
        write!(f, "{{{}}}", words.join(", "))
    }
}

fn literal(tensor: &Tensor) -> String {
    fn list<T: fmt::Debug>(values: impl Iterator<Item = T>) -> String {
        format!("[{}]", values.map(|value| format!("{value:?}")).collect::<Vec<_>>().join(", "))
    }
    let has_nan = tensor.as_f32().is_some_and(|array| array.iter().any(|value| value.is_nan()));
    let hex = || {
        tensor.to_le_bytes().iter().fold(String::from("0x"), |mut hex, byte| {
            hex.push_str(&format!("{byte:02x}"));
            hex
        })
    };
    match tensor {
        _ if has_nan || tensor.n_elements() > MAX_PRINTED => hex(),
        Tensor::F32(array) => list(array.iter()),
        Tensor::I64(array) => list(array.iter()),
        Tensor::Bool(array) => list(array.iter()),
        Tensor::F16(_) | Tensor::BF16(_) | Tensor::I8(_) | Tensor::U8(_) => hex(),
    }
}

impl Graph {
    /// Reads the text form. Facts are inferred again and must agree with the text.
    pub fn parse(text: &str) -> Result<Graph, TextError> {
        let mut parser = Parser { graph: Graph::new(""), ids: BTreeMap::new() };
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let at =
            |index: usize| move |problem| TextError { line: index + 1, problem: Box::new(problem) };
        let (first, head) = lines.next().ok_or_else(|| at(0)(wrong("a graph", "")))?;
        let outputs = parser.head(head).map_err(at(first))?;
        for (index, line) in lines {
            parser.line(line).map_err(at(index))?;
        }
        for (name, number) in outputs {
            let id = parser.value(number).map_err(at(first))?;
            parser.graph.output(name, id);
        }
        Ok(parser.graph)
    }
}

fn wrong(expected: &str, found: &str) -> TextProblem {
    TextProblem::Syntax { expected: expected.into(), found: found.into() }
}

/// The parts of `text` before and after the first `separator`.
fn split<'a>(text: &'a str, separator: &str) -> Result<(&'a str, &'a str), TextProblem> {
    let parts = text.split_once(separator);
    parts.ok_or_else(|| wrong(&format!("`{separator}`"), text)).map(|(a, b)| (a.trim(), b.trim()))
}

/// What stands between `open` at the start of `text` and `close` at its end.
fn inside<'a>(text: &'a str, open: &str, close: &str) -> Result<&'a str, TextProblem> {
    let inner = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    inner.ok_or_else(|| wrong(&format!("`{open}…{close}`"), text))
}

/// The parts of a list, at commas that stand in no bracket.
fn list(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0i32, 0);
    for (index, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth = depth.saturating_add(1),
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(text[start..index].trim());
                start = index + 1;
            }
            _ => {}
        }
    }
    match text[start..].trim() {
        "" if parts.is_empty() => {}
        last => parts.push(last),
    }
    parts
}

struct Parser<'a> {
    graph: Graph,
    ids: BTreeMap<&'a str, ValueId>,
}

impl<'a> Parser<'a> {
    /// Reads the first line; returns the outputs.
    fn head(&mut self, line: &'a str) -> Result<Vec<(&'a str, &'a str)>, TextProblem> {
        let (head, outputs) = split(line, "->")?;
        let head = head.strip_prefix("graph ").ok_or_else(|| wrong("`graph NAME(…)`", head))?;
        let (name, inputs) = split(head, "(")?;
        self.graph.name = name.to_owned();
        let inputs = inputs.strip_suffix(')').ok_or_else(|| wrong("`)`", inputs))?;
        for input in list(inputs) {
            let (id, input) = split(input, " ")?;
            let (name, fact) = split(input, ":")?;
            let value = self.graph.input(name, parse_fact(fact)?);
            self.define(id, value)?;
        }
        list(inside(outputs, "(", ")")?).into_iter().map(|output| split(output, ":")).collect()
    }

    fn line(&mut self, line: &'a str) -> Result<(), TextProblem> {
        let (results, meaning) = split(line, " = ")?;
        let results = list(results);
        let results: Result<Vec<_>, TextProblem> = results.iter().map(|r| split(r, ":")).collect();
        let results = results?;
        let facts: Result<Vec<Fact>, TextProblem> =
            results.iter().map(|r| parse_fact(r.1)).collect();
        let (facts, names) = (facts?, results.iter().map(|r| r.0));
        let ids = match meaning.split_once(' ') {
            Some(("weight", name)) => vec![self.weight(name, &facts)?],
            Some(("literal", data)) => {
                let [fact] = facts.as_slice() else { return Err(wrong("one value", line)) };
                vec![self.graph.literal(parse_literal(fact, data)?)]
            }
            _ => self.node(meaning)?,
        };
        let found: Vec<Fact> = ids.iter().map(|id| self.graph.fact(*id).clone()).collect();
        if found != facts {
            let words = |facts: &[Fact]| {
                facts.iter().map(Fact::to_string).collect::<Vec<String>>().join(", ")
            };
            return Err(wrong(&words(&found), &words(&facts)));
        }
        names.zip(ids).try_for_each(|(name, id)| self.define(name, id))
    }

    fn weight(&mut self, name: &str, facts: &[Fact]) -> Result<ValueId, TextProblem> {
        let [fact] = facts else { return Err(wrong("one value", name)) };
        Ok(self.graph.weight(&unquoted(name)?, fact.clone()))
    }

    fn node(&mut self, meaning: &'a str) -> Result<Vec<ValueId>, TextProblem> {
        let (call, name) = split(meaning, "#")?;
        let (op, rest) = split(call, "(")?;
        let (inputs, rest) = split(rest, ")")?;
        let attributes = match rest {
            "" => Attributes::none(),
            _ => parse_attributes(inside(rest, "{", "}")?)?,
        };
        let op = Op::from_attributes(op, &attributes)?;
        let inputs: Result<Vec<ValueId>, TextProblem> =
            list(inputs).into_iter().map(|input| self.value(input)).collect();
        let outputs = self.graph.add_many(name, op, &inputs?)?;
        match self.graph.nodes().last() {
            Some(node) if node.name == name => Ok(outputs),
            _ => Err(wrong("a name that no other node has", name)),
        }
    }

    fn define(&mut self, name: &'a str, id: ValueId) -> Result<(), TextProblem> {
        let is_number = name.strip_prefix('%').is_some_and(|n| n.parse::<u32>().is_ok());
        match is_number && self.ids.insert(name, id).is_none() {
            true => Ok(()),
            false => Err(wrong("a new value such as `%7`", name)),
        }
    }

    fn value(&self, name: &str) -> Result<ValueId, TextProblem> {
        self.ids.get(name).copied().ok_or_else(|| wrong("a value of a line before", name))
    }
}

fn parse_fact(text: &str) -> Result<Fact, TextProblem> {
    let (dtype, shape) = split(text, "[")?;
    let dtype = DType::from_name(dtype).ok_or_else(|| wrong("an element type", dtype))?;
    let shape = shape.strip_suffix(']').ok_or_else(|| wrong("`]`", shape))?;
    Ok(Fact { dtype, shape: parse_dims(shape)? })
}

fn parse_dims(text: &str) -> Result<Vec<Dim>, TextProblem> {
    let parse = |dim: &str| dim.parse::<Dim>().map_err(|_| wrong("a dimension", dim));
    list(text).into_iter().map(parse).collect()
}

/// Reads a quoted word with Rust's escapes `\\`, `\"` and `\'`; others are not needed.
fn unquoted(text: &str) -> Result<String, TextProblem> {
    let inner = inside(text, "\"", "\"")?;
    let mut word = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        word.push(match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | '"' | '\'')) => c,
                _ => return Err(wrong("`\\\\` or `\\\"`", text)),
            },
            '"' => return Err(wrong("`\\\"`", text)),
            c => c,
        });
    }
    Ok(word)
}

fn parse_attributes(text: &str) -> Result<Attributes, TextProblem> {
    let mut attributes = Attributes::none();
    for attribute in list(text) {
        let (name, value) = split(attribute, "=")?;
        attributes = attributes.with(name, parse_attribute(value)?);
    }
    Ok(attributes)
}

fn parse_attribute(text: &str) -> Result<Attribute, TextProblem> {
    let number = || text.parse::<i64>().map(Attribute::Int);
    let float = || text.parse::<f32>().map(Attribute::Float);
    match text.chars().next() {
        Some('"') => unquoted(text).map(Attribute::Text),
        Some('(') => parse_dims(inside(text, "(", ")")?).map(Attribute::Dims),
        Some('[') => {
            let parse = |part: &str| part.parse().map_err(|_| wrong("an integer", part));
            list(inside(text, "[", "]")?)
                .into_iter()
                .map(parse)
                .collect::<Result<Vec<i64>, TextProblem>>()
                .map(Attribute::Ints)
        }
        _ => number().or_else(|_| float()).map_err(|_| wrong("an attribute's value", text)),
    }
}

fn parse_literal(fact: &Fact, text: &str) -> Result<Tensor, TextProblem> {
    let shape = fact.known_shape().ok_or_else(|| wrong("a known shape", &fact.to_string()))?;
    let bytes = match text.strip_prefix("0x") {
        Some(hex) => parse_hex(hex)?,
        None => {
            let values = list(inside(text, "[", "]")?);
            let bytes = values.into_iter().map(|value| element_bytes(fact.dtype, value));
            bytes.collect::<Result<Vec<Vec<u8>>, TextProblem>>()?.concat()
        }
    };
    let wrong_size = |error: TensorError| wrong(&fact.to_string(), &error.to_string());
    match Tensor::from_stored_bytes(fact.dtype, &shape, &bytes) {
        Some(tensor) => Ok(tensor),
        None => Tensor::from_le_bytes(fact.dtype, &shape, &bytes).map_err(wrong_size),
    }
}

fn element_bytes(dtype: DType, text: &str) -> Result<Vec<u8>, TextProblem> {
    let bytes = match dtype {
        DType::F32 => text.parse::<f32>().ok().map(|value| value.to_le_bytes().to_vec()),
        DType::I64 => text.parse::<i64>().ok().map(|value| value.to_le_bytes().to_vec()),
        DType::Bool => text.parse::<bool>().ok().map(|value| vec![u8::from(value)]),
        // Literals of other types are hexadecimal.
        DType::F64 | DType::F16 | DType::BF16 | DType::I32 | DType::I16 | DType::I8 | DType::U8 => {
            None
        }
    };
    bytes.ok_or_else(|| wrong(&format!("a value of {dtype}"), text))
}

fn parse_hex(text: &str) -> Result<Vec<u8>, TextProblem> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let pair = |pair: &[u8; 2]| Some(digit(&pair[0])? << 4 | digit(&pair[1])?);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes: Option<Vec<u8>> = pairs.iter().map(pair).collect();
    let whole = bytes.filter(|_| rest.is_empty());
    whole.ok_or_else(|| wrong("pairs of hex digits", text.get(..40).unwrap_or(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let error = Graph::parse(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn errors_name_line_and_place() {
        let head = "graph g(%0 x: f32[2]) -> (y: %1)\n";
        check("", "line 1: expected a graph");
        check("graph g(%0 x: f9[2]) -> ()", "element type, got `f9`");
        check(
            &format!("{head}  %1: f32[3] = Tanh(%0) # t"),
            "line 2: expected f32[2], got `f32[3]`",
        );
        check(&format!("{head}  %1: f32[2] = Tonh(%0) # t"), "no op is called `Tonh`");
        check(&format!("{head}  %1: f32[2] = Tanh(%7) # t"), "got `%7`");
        check(&format!("{head}  %1: f32[2] = Tanh(%0) {{x = 1}} # t"), "unknown attribute");
        check(&format!("{head}  %0: f32[2] = Tanh(%0) # t"), "a new value");
        check(head, "got `%1`");
        check(&format!("{head}  %1: f32[2] = literal 0x00"), "needs 8 bytes, got 1");
        check(&format!("{head}  %1: f32[2] = literal [1.0, é]"), "a value of f32");
    }

    #[test]
    fn literals_are_exact() {
        let mut graph = Graph::new("literals");
        let tensors = [
            Tensor::scalar(0.1),
            Tensor::vector(vec![f32::INFINITY, -0.0, f32::MIN_POSITIVE / 2.0]),
            Tensor::vector(vec![f32::NAN]),
            Tensor::vector((0..9).map(|i| i as f32 / 3.0).collect()),
            Tensor::i64(&[2, 0], vec![]).unwrap(),
            Tensor::i64(&[2], vec![i64::MIN, 7]).unwrap(),
            Tensor::from_le_bytes(DType::Bool, &[2], &[0, 1]).unwrap(),
            Tensor::from_stored_bytes(DType::BF16, &[1], &[0x80, 0x3f]).unwrap(),
            Tensor::from_stored_bytes(DType::I8, &[2, 1], &[0, 0xff]).unwrap(),
        ];
        for (index, tensor) in tensors.iter().enumerate() {
            let id = graph.literal(tensor.clone());
            graph.output(&format!("y{index}"), id);
        }
        let parsed = Graph::parse(&graph.to_string()).unwrap();
        for ((_, id), tensor) in parsed.outputs().iter().zip(&tensors) {
            let Some(Constant::Literal(found)) = &parsed.value(*id).constant else { panic!() };
            assert_eq!(found.fact(), tensor.fact());
            assert_eq!(found.to_le_bytes(), tensor.to_le_bytes());
        }
    }
}
