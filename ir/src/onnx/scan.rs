//! Walks a file's bytes before they are decoded: only the messages that files of our form have,
//! and no more fields than the limit, so that decoding cannot allocate more than was agreed.

use super::{OnnxError, ReadLimits};

/// A message type of our form.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Message {
    Model,
    Opset,
    Entry,
    Graph,
    Node,
    Attribute,
    Tensor,
    ValueInfo,
    Type,
    TensorType,
    Shape,
    Dimension,
    Function,
}

/// What a length-delimited field holds.
enum Content {
    Bytes,
    Message(Message),
}

/// The content of field `field` of `message`, by the numbers of `onnx.proto`.
fn content(message: Message, field: u64) -> Option<Content> {
    use Message::*;
    Some(match (message, field) {
        (Model, 7) => Content::Message(Graph),
        (Model | Function, 8 | 9) => Content::Message(Opset),
        (Model, 14) | (Tensor, 13) => Content::Message(Entry),
        (Model, 25) => Content::Message(Function),
        (Graph, 1) | (Function, 7) => Content::Message(Node),
        (Graph, 5) | (Attribute, 5) => Content::Message(Tensor),
        (Graph, 11..=13) => Content::Message(ValueInfo),
        (Node, 5) => Content::Message(Attribute),
        (ValueInfo, 2) => Content::Message(Type),
        (Type, 1) => Content::Message(TensorType),
        (TensorType, 2) => Content::Message(Shape),
        (Shape, 1) => Content::Message(Dimension),
        (Model, 2 | 3)
        | (Opset, 1)
        | (Entry, 1 | 2)
        | (Graph, 2)
        | (Node, 1..=4 | 7)
        | (Attribute, 1 | 4)
        | (Tensor, 8 | 9)
        | (ValueInfo, 1)
        | (Dimension, 2)
        | (Function, 1 | 4..=6 | 10) => Content::Bytes,
        _ => return None,
    })
}

/// Errors unless `bytes` is a model of our form within `limits`.
pub(super) fn scan(bytes: &[u8], limits: &ReadLimits) -> Result<(), OnnxError> {
    if bytes.len() > limits.max_bytes {
        let found = format!("{} bytes", bytes.len());
        return Err(malformed("file", format!("at most {} bytes", limits.max_bytes), found));
    }
    let mut n_fields = 0;
    message(bytes, Message::Model, limits.max_fields, &mut n_fields)
}

fn malformed(place: &str, expected: String, found: String) -> OnnxError {
    OnnxError::Malformed { place: place.to_owned(), expected, found }
}

/// Walks one message; the nesting of [`Message`] has a fixed depth.
fn message(
    mut bytes: &[u8],
    kind: Message,
    max_fields: usize,
    n_fields: &mut usize,
) -> Result<(), OnnxError> {
    let place = format!("{kind:?} message");
    let cut = || malformed(&place, "a whole field".into(), "a cut one".into());
    while !bytes.is_empty() {
        *n_fields += 1;
        if *n_fields > max_fields {
            return Err(malformed("file", format!("at most {max_fields} fields"), "more".into()));
        }
        let key = varint(&mut bytes).ok_or_else(cut)?;
        match key & 7 {
            0 => {
                varint(&mut bytes).ok_or_else(cut)?;
            }
            1 => bytes = bytes.get(8..).ok_or_else(cut)?,
            2 => {
                let length = varint(&mut bytes).and_then(|n| usize::try_from(n).ok());
                let (value, rest) =
                    length.and_then(|n| bytes.split_at_checked(n)).ok_or_else(cut)?;
                bytes = rest;
                match content(kind, key >> 3) {
                    Some(Content::Bytes) => {}
                    Some(Content::Message(inner)) => {
                        message(value, inner, max_fields, n_fields)?;
                    }
                    None => {
                        let expected = "only fields that this program writes".into();
                        return Err(malformed(&place, expected, format!("field {}", key >> 3)));
                    }
                }
            }
            5 => bytes = bytes.get(4..).ok_or_else(cut)?,
            other => {
                let expected = "wire type 0, 1, 2 or 5".into();
                return Err(malformed(&place, expected, other.to_string()));
            }
        }
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for index in 0..10 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(7 * index).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], max_fields: usize) -> bool {
        scan(bytes, &ReadLimits { max_bytes: 64, max_fields, ..ReadLimits::default() }).is_ok()
    }

    #[test]
    fn fields_are_counted_before_decoding() {
        // Three empty functions.
        let functions = [0xca, 0x01, 0, 0xca, 0x01, 0, 0xca, 0x01, 0];
        assert!(check(&functions, 3));
        assert!(!check(&functions, 2));
        assert!(!check(&[0; 65], 100));
    }

    #[test]
    fn foreign_fields_and_cut_messages_are_rejected() {
        assert!(check(&[0x12, 1, b'a'], 9));
        assert!(!check(&[0x12, 2, b'a'], 9), "cut");
        assert!(!check(&[0x3a, 2, 0x12], 9), "cut inside");
        assert!(!check(&[0xa2, 0x01, 0], 9), "training_info");
        assert!(!check(&[0x0b], 9), "group");
        assert!(!check(&[0xff; 11], 9), "endless varint");
    }
}
