//! Flat tensor names from an unpickled structure.
//!
//! A state dict gives its keys. Of a training checkpoint only the nested state dict counts.
//! Nested containers and TorchScript modules give key paths joined by dots.

use super::pickle::{Dialect, Node, TensorRef, Unpickled, Value, kind, shorten};

/// Keys under which training loops nest the state dict, in order of preference.
const NESTING_KEYS: [&str; 3] = ["model_state_dict", "state_dict", "model"];
/// Prefix of every key of a model wrapped for data-parallel training.
const PARALLEL_PREFIX: &str = "module.";
const MAX_DEPTH: usize = 64;
const MAX_NAME_BYTES: usize = 1024;
const MAX_VISITS: usize = 4 << 20;
const MAX_NAMES: usize = 1 << 18;

/// A structure that is not a set of named tensors.
#[derive(Debug)]
pub(super) struct Misfit {
    /// Key path, shortened.
    pub(super) place: String,
    pub(super) expected: String,
    pub(super) found: String,
}

/// All tensors with their names, in the order of the file. Names may repeat.
pub(super) fn collect<'p, 'a>(
    pickle: &'p Unpickled<'a>,
    dialect: Dialect,
) -> Result<Vec<(String, &'p TensorRef<'a>)>, Misfit> {
    let root = match dialect {
        Dialect::Torch => state_dict(pickle),
        Dialect::TorchScript => pickle.root,
    };
    let mut collector =
        Collector { pickle, dialect, found: Vec::new(), path: String::new(), visits: 0 };
    if !collector.descends(root) {
        let found = kind(&pickle.nodes, root).to_string();
        return Err(collector.misfit("a dict or module of tensors", found));
    }
    collector.visit(root, 0)?;
    let mut found = collector.found;
    if dialect == Dialect::Torch {
        strip_parallel_prefix(&mut found);
    }
    Ok(found)
}

/// Follows the nesting keys of training checkpoints.
fn state_dict<'a>(pickle: &Unpickled<'a>) -> Value<'a> {
    let mut value = pickle.root;
    for _ in 0..MAX_DEPTH {
        let Some(inner) = NESTING_KEYS.iter().find_map(|key| nested(pickle, value, key)) else {
            break;
        };
        value = inner;
    }
    value
}

/// The dict under `key` of the dict `value`.
fn nested<'a>(pickle: &Unpickled<'a>, value: Value<'a>, key: &str) -> Option<Value<'a>> {
    let Node::Dict(entries) = node(pickle, value)? else { return None };
    let is_match = |name: &Value<'_>| matches!(name, Value::Str(name) if *name == key);
    let (_, inner) = entries.iter().find(|(name, _)| is_match(name))?;
    matches!(node(pickle, *inner), Some(Node::Dict(_))).then_some(*inner)
}

fn node<'p, 'a>(pickle: &'p Unpickled<'a>, value: Value<'a>) -> Option<&'p Node<'a>> {
    match value {
        Value::Node(node) => pickle.nodes.get(node),
        _ => None,
    }
}

fn strip_parallel_prefix<T>(found: &mut [(String, T)]) {
    if found.iter().all(|(name, _)| name.starts_with(PARALLEL_PREFIX)) {
        for (name, _) in found {
            name.drain(..PARALLEL_PREFIX.len());
        }
    }
}

struct Collector<'p, 'a> {
    pickle: &'p Unpickled<'a>,
    dialect: Dialect,
    found: Vec<(String, &'p TensorRef<'a>)>,
    /// Key path of the value being visited.
    path: String,
    visits: usize,
}

impl<'p, 'a> Collector<'p, 'a> {
    /// Whether tensors inside `value` count: TorchScript has parameters and buffers as
    /// attributes of modules, `torch.save` has them in containers.
    fn descends(&self, value: Value<'a>) -> bool {
        let node = node(self.pickle, value);
        match self.dialect {
            Dialect::Torch => matches!(node, Some(Node::Dict(_) | Node::List(_) | Node::Tuple(_))),
            Dialect::TorchScript => matches!(node, Some(Node::Object(_))),
        }
    }

    fn visit(&mut self, value: Value<'a>, depth: usize) -> Result<(), Misfit> {
        self.visits += 1;
        if self.visits > MAX_VISITS || depth > MAX_DEPTH {
            let expected = format!("at most {MAX_DEPTH} levels and {MAX_VISITS} values");
            return Err(self.misfit(&expected, "more".into()));
        }
        if let Some(Node::Tensor(tensor)) = node(self.pickle, value) {
            return self.push(tensor);
        }
        if !self.descends(value) {
            return Ok(());
        }
        match node(self.pickle, value) {
            Some(Node::Dict(entries)) => self.visit_entries(entries, depth),
            Some(Node::List(items) | Node::Tuple(items)) => self.visit_items(items, depth),
            Some(Node::Object(Some(state))) => match node(self.pickle, *state) {
                Some(Node::Dict(entries)) => self.visit_entries(entries, depth),
                _ => Ok(()),
            },
            Some(Node::Object(None) | Node::Storage(_) | Node::Tensor(_)) | None => Ok(()),
        }
    }

    fn visit_entries(
        &mut self,
        entries: &[(Value<'a>, Value<'a>)],
        depth: usize,
    ) -> Result<(), Misfit> {
        for (key, value) in entries {
            match key {
                Value::Str(key) => self.visit_child(key, *value, depth)?,
                Value::Int(key) => self.visit_child(&key.to_string(), *value, depth)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn visit_items(&mut self, items: &[Value<'a>], depth: usize) -> Result<(), Misfit> {
        for (idx, value) in items.iter().enumerate() {
            self.visit_child(&idx.to_string(), *value, depth)?;
        }
        Ok(())
    }

    fn visit_child(&mut self, key: &str, value: Value<'a>, depth: usize) -> Result<(), Misfit> {
        if !matches!(value, Value::Node(_)) {
            return Ok(());
        }
        let parent_bytes = self.path.len();
        if parent_bytes + key.len() >= MAX_NAME_BYTES {
            let expected = format!("names of at most {MAX_NAME_BYTES} bytes");
            return Err(self.misfit(&expected, "a longer one".into()));
        }
        if parent_bytes > 0 {
            self.path.push('.');
        }
        self.path.push_str(key);
        self.visit(value, depth + 1)?;
        self.path.truncate(parent_bytes);
        Ok(())
    }

    fn push(&mut self, tensor: &'p TensorRef<'a>) -> Result<(), Misfit> {
        if self.found.len() >= MAX_NAMES {
            return Err(self.misfit(&format!("at most {MAX_NAMES} tensors"), "more".into()));
        }
        self.found.push((self.path.clone(), tensor));
        Ok(())
    }

    fn misfit(&self, expected: &str, found: String) -> Misfit {
        Misfit { place: shorten(&self.path), expected: expected.into(), found }
    }
}
