//! Web archives (WARC, plain or gzip): a stream of records → web resources; pictures on disk by address.
//!
//! The format is read here, over `httparse` for the header fields, because the `warc` crate (0.4) panics
//! at a record without `Content-Length` and takes memory without a limit.
//! <https://iipc.github.io/warc-specifications/specifications/warc-format/warc-1.1/>

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};

use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use url::Url;

use super::document::read_at_most;
use crate::picture::MAX_PICTURE_BYTES;
use crate::report::PageReject;

/// Most bytes of a record; larger ones, such as films, are passed over.
const MAX_RECORD_BYTES: u64 = MAX_PICTURE_BYTES + (64 << 10);
/// Most bytes of the header of a record.
const MAX_HEADER_BYTES: u64 = 64 << 10;
/// Most fields of a header.
const MAX_FIELDS: usize = 128;

/// What an address stood for when it was archived.
pub(super) struct Resource {
    /// `WARC-Target-URI`.
    pub(super) address: String,
    /// `Content-Type`, in lower case.
    content_type: String,
    /// Without transfer and content encodings.
    pub(super) body: Vec<u8>,
}

impl Resource {
    pub(super) fn is_html(&self) -> bool {
        self.content_type.contains("html")
    }

    fn is_picture(&self) -> bool {
        self.content_type.starts_with("image/") || image::guess_format(&self.body).is_ok()
    }

    /// The encoding that the header names.
    pub(super) fn charset(&self) -> Option<&str> {
        let (_, charset) = self.content_type.split_once("charset=")?;
        Some(charset.split(';').next()?.trim().trim_matches(['"', '\'']))
    }
}

/// Resources of an archive in its order: answers with status 200, and resources stored without HTTP. A
/// record that cannot be read is an error; after one whose end is unknown the stream ends.
pub(super) fn resources<'a>(
    mut archive: impl BufRead + 'a,
) -> impl Iterator<Item = Result<Resource, PageReject>> + 'a {
    let is_gzip = archive.fill_buf().is_ok_and(|bytes| bytes.starts_with(&[0x1f, 0x8b]));
    let reader: Box<dyn BufRead + 'a> = match is_gzip {
        true => Box::new(BufReader::new(MultiGzDecoder::new(archive))),
        false => Box::new(archive),
    };
    Records { reader: Some(reader) }.filter_map(|record| match record {
        Ok(record) => resource_of(record).transpose(),
        Err(reason) => Some(Err(reason)),
    })
}

/// Header fields, names in lower case.
type Fields = HashMap<String, String>;

struct Record {
    fields: Fields,
    block: Vec<u8>,
}

struct Records<'a> {
    /// `None` after the end.
    reader: Option<Box<dyn BufRead + 'a>>,
}

impl Iterator for Records<'_> {
    type Item = Result<Record, PageReject>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // Put back only where the next record is known to begin.
            let mut reader = self.reader.take()?;
            let (fields, len) = match read_header(&mut reader) {
                Ok(header) => header?,
                Err(_) => return Some(Err(PageReject::Unreadable)),
            };
            let Ok(block) = read_block(&mut reader, len) else {
                return Some(Err(PageReject::Unreadable));
            };
            self.reader = Some(reader);
            if let Some(block) = block {
                return Some(Ok(Record { fields, block }));
            }
        }
    }
}

/// Fields of the next record and the length of its block; `None` at the end of the archive.
fn read_header(reader: &mut impl BufRead) -> io::Result<Option<(Fields, u64)>> {
    let mut limited = reader.take(MAX_HEADER_BYTES);
    let mut header = Vec::new();
    loop {
        let start = header.len();
        let n_bytes = limited.read_until(b'\n', &mut header)?;
        match (&header[start..], header.len() == n_bytes) {
            ([], true) => return Ok(None),
            // Records end with empty lines.
            (b"\r\n" | b"\n", true) => header.clear(),
            (b"\r\n" | b"\n", false) => break,
            (line, _) if line.ends_with(b"\n") => {}
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
    let fields = fields_of(&header).ok_or(io::ErrorKind::InvalidData)?;
    let len = fields.get("content-length").and_then(|len| len.trim().parse().ok());
    Ok(Some((fields, len.ok_or(io::ErrorKind::InvalidData)?)))
}

/// The fields after the line `WARC/1.1`.
fn fields_of(header: &[u8]) -> Option<Fields> {
    let version_end =
        header.starts_with(b"WARC/").then(|| header.iter().position(|&b| b == b'\n'))??;
    let mut slots = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let parsed = httparse::parse_headers(&header[version_end + 1..], &mut slots).ok()?;
    let httparse::Status::Complete((_, fields)) = parsed else { return None };
    Some(map_of(fields))
}

/// The first of each name.
fn map_of(fields: &[httparse::Header<'_>]) -> Fields {
    let mut map = Fields::new();
    for field in fields {
        let value = String::from_utf8_lossy(field.value).into_owned();
        map.entry(field.name.to_ascii_lowercase()).or_insert(value);
    }
    map
}

/// A block of `len` bytes; `None`, with the reader after it, if that is over the limit.
fn read_block(reader: &mut impl BufRead, len: u64) -> io::Result<Option<Vec<u8>>> {
    let mut limited = reader.take(len);
    let mut block = Vec::new();
    let n_read = match len <= MAX_RECORD_BYTES {
        true => limited.read_to_end(&mut block)?.try_into().unwrap_or(u64::MAX),
        false => io::copy(&mut limited, &mut io::sink())?,
    };
    match n_read == len {
        true => Ok((len <= MAX_RECORD_BYTES).then_some(block)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// `None` for records of other kinds: requests, metadata, redirections.
fn resource_of(record: Record) -> Result<Option<Resource>, PageReject> {
    let field = |name: &str| record.fields.get(name).map(String::as_str).unwrap_or_default();
    let address = field("warc-target-uri").trim().trim_matches(['<', '>']).to_owned();
    let content_type = field("content-type").to_lowercase();
    match field("warc-type").trim() {
        "resource" => Ok(Some(Resource { address, content_type, body: record.block })),
        "response" if content_type.starts_with("application/http") => {
            let answer = answer_of(&record.block).ok_or(PageReject::Unreadable)?;
            Ok(answer.map(|(content_type, body)| Resource { address, content_type, body }))
        }
        _ => Ok(None),
    }
}

/// Content type and body of an HTTP answer; `Some(None)` if its status is not 200, `None` if it is broken.
fn answer_of(block: &[u8]) -> Option<Option<(String, Vec<u8>)>> {
    let mut slots = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut answer = httparse::Response::new(&mut slots);
    let httparse::Status::Complete(body_start) = answer.parse(block).ok()? else { return None };
    if answer.code != Some(200) {
        return Some(None);
    }
    let fields = map_of(answer.headers);
    let has = |name: &str, value: &str| {
        fields.get(name).is_some_and(|found| found.to_ascii_lowercase().contains(value))
    };
    let mut body = block.get(body_start..)?.to_vec();
    // Crawlers often store the body decoded, under the header as it came.
    if has("transfer-encoding", "chunked") {
        body = unchunk(&body).unwrap_or(body);
    }
    if has("content-encoding", "gzip") && body.starts_with(&[0x1f, 0x8b]) {
        body = read_at_most(MultiGzDecoder::new(&body[..]), MAX_PICTURE_BYTES)?;
    } else if has("content-encoding", "deflate") {
        body = read_at_most(ZlibDecoder::new(&body[..]), MAX_PICTURE_BYTES).unwrap_or(body);
    } else if has("content-encoding", "br") && std::str::from_utf8(&body).is_err() {
        return None;
    }
    Some(Some((fields.get("content-type").map(|t| t.to_lowercase()).unwrap_or_default(), body)))
}

/// <https://www.rfc-editor.org/rfc/rfc9112#name-chunked-transfer-coding>
fn unchunk(body: &[u8]) -> Option<Vec<u8>> {
    let (mut rest, mut whole) = (body, Vec::new());
    loop {
        let httparse::Status::Complete((start, len)) = httparse::parse_chunk_size(rest).ok()?
        else {
            return None;
        };
        if len == 0 {
            return Some(whole);
        }
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        whole.extend_from_slice(rest.get(start..end)?);
        rest = rest.get(end..)?.strip_prefix(b"\r\n")?;
    }
}

/// The pictures of an archive, in a temporary file.
pub(super) struct Pictures {
    file: File,
    len: u64,
    /// Place and length by address without fragment.
    places: HashMap<String, (u64, u64)>,
}

impl Pictures {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile()?, len: 0, places: HashMap::new() })
    }

    /// Keeps a picture, the first of its address; ignores all else.
    pub(super) fn add(&mut self, resource: &Resource) -> io::Result<()> {
        let Ok(mut address) = Url::parse(&resource.address) else { return Ok(()) };
        address.set_fragment(None);
        if !resource.is_picture() || self.places.contains_key(address.as_str()) {
            return Ok(());
        }
        self.file.write_all(&resource.body)?;
        let len = u64::try_from(resource.body.len()).map_err(io::Error::other)?;
        self.places.insert(address.into(), (self.len, len));
        self.len += len;
        Ok(())
    }

    pub(super) fn read(&mut self, address: &Url) -> Option<Vec<u8>> {
        let &(place, len) = self.places.get(address.as_str())?;
        self.file.seek(SeekFrom::Start(place)).ok()?;
        read_at_most((&self.file).take(len), MAX_PICTURE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Write};

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::{resources, unchunk};

    fn record(kind: &str, content_type: &str, block: &[u8]) -> Vec<u8> {
        let mut record = format!(
            "WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://h/{kind}\r\n\
             content-length: {}\r\nContent-Type: {content_type}\r\n\r\n",
            block.len()
        )
        .into_bytes();
        record.extend_from_slice(block);
        record.extend_from_slice(b"\r\n\r\n");
        record
    }

    fn answer(fields: &str, body: &[u8]) -> Vec<u8> {
        [format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{fields}\r\n").as_bytes(), body]
            .concat()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Bodies in order, `ERROR` where there is none.
    fn bodies(archive: &[u8]) -> Vec<String> {
        let body = |resource: Result<super::Resource, _>| match resource {
            Ok(resource) => String::from_utf8_lossy(&resource.body).into_owned(),
            Err(_) => "ERROR".to_owned(),
        };
        resources(BufReader::new(archive)).map(body).collect()
    }

    const HTTP: &str = "application/http; msgtype=response";

    #[test]
    fn encodings_are_undone() {
        let zipped = gzip(b"zipped");
        let records = [
            record("warcinfo", "application/warc-fields", b"software: x"),
            record("response", HTTP, &answer("", b"plain")),
            record(
                "response",
                HTTP,
                &answer("Transfer-Encoding: chunked\r\n", b"3\r\nchu\r\n4\r\nnked\r\n0\r\n\r\n"),
            ),
            record("response", HTTP, &answer("Transfer-Encoding: chunked\r\n", b"not chunked")),
            record("response", HTTP, &answer("Content-Encoding: gzip\r\n", &zipped)),
            record("response", HTTP, &answer("Content-Encoding: gzip\r\n", b"not zipped")),
            record("response", HTTP, b"HTTP/1.1 301 Moved\r\nLocation: /x\r\n\r\n"),
            record("response", HTTP, b"no answer"),
            record("resource", "text/html", b"resource"),
            record("response", "text/dns", b"dns"),
        ];
        let expected =
            ["plain", "chunked", "not chunked", "zipped", "not zipped", "ERROR", "resource"];
        assert_eq!(bodies(&records.concat()), expected);
        let zipped: Vec<Vec<u8>> = records.iter().map(|record| gzip(record)).collect();
        assert_eq!(bodies(&zipped.concat()), expected);
    }

    #[test]
    fn an_archive_that_breaks_off_gives_what_is_whole() {
        let whole = record("resource", "text/html", b"whole");
        let cut = &record("resource", "text/html", b"cut off")[..90];
        assert_eq!(bodies(&[&whole[..], cut].concat()), ["whole", "ERROR"]);
        assert_eq!(bodies(&[&whole[..], b"rubbish\r\n\r\n"].concat()), ["whole", "ERROR"]);
        let no_length = b"WARC/1.0\r\nWARC-Type: resource\r\n\r\nabc\r\n\r\n";
        assert_eq!(bodies(&[&whole[..], no_length].concat()), ["whole", "ERROR"]);
        let huge = b"WARC/1.0\r\nContent-Length: 18446744073709551615\r\n\r\nabc";
        assert_eq!(bodies(huge), ["ERROR"]);
        assert_eq!(bodies(&[b'x'; 100_000]), ["ERROR"]);
        assert_eq!(bodies(b""), [""; 0]);
    }

    proptest! {
        #[test]
        fn a_damaged_archive_never_panics(place: usize, byte: u8, end: usize) {
            let mut archive = [
                record("response", HTTP, &answer("Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n0\r\n\r\n")),
                record("resource", "text/html", b"resource"),
            ]
            .concat();
            let len = archive.len();
            archive[place % len] = byte;
            archive.truncate(end % (len + 1));
            prop_assert!(bodies(&archive).len() <= 4);
            unchunk(&archive);
        }
    }
}
