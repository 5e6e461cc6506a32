//! Inputs → documents: HTML files, folders and web archives, each with a way to its pictures.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use data_url::DataUrl;
use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};
use percent_encoding::percent_decode_str;
use url::Url;

use super::warc;
use crate::Error;
use crate::folder::Folder;
use crate::picture::MAX_PICTURE_BYTES;
use crate::report::PageReject;

/// Most bytes of a page.
pub(super) const MAX_PAGE_BYTES: u64 = 2 << 20;

/// How far into a page `<meta charset>` is looked for, in bytes, as in the HTML standard.
const CHARSET_WITHIN: usize = 1024;

/// A page before it is parsed.
pub(super) struct Document {
    /// Path below its input, or address.
    pub(super) source: String,
    /// What addresses in it are relative to.
    pub(super) base: Url,
    /// Its text.
    pub(super) html: String,
}

/// Bytes of pictures by address. Nothing comes over the network.
pub(super) trait Fetch {
    fn fetch(&mut self, address: &Url) -> Option<Vec<u8>>;
}

/// What is done with each document, or with the reason why one could not be read.
pub(super) type Visit<'a> =
    dyn FnMut(Result<Document, PageReject>, &mut dyn Fetch) -> Result<(), Error> + 'a;

/// Visits all documents of an input, those of a folder by name.
pub(super) fn visit(input: &Path, visit: &mut Visit<'_>) -> Result<(), Error> {
    let metadata = input.metadata().map_err(Error::file(input))?;
    if metadata.is_dir() {
        let mut paths = Vec::new();
        list(input, &mut paths)?;
        paths.sort();
        return paths.iter().try_for_each(|path| visit_file(input, path, visit));
    }
    match Kind::of(input) {
        Some(_) => visit_file(input.parent().unwrap_or(Path::new("")), input, visit),
        None => Err(Error::Input { path: input.to_owned() }),
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Html,
    Warc,
}

impl Kind {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_lowercase();
        let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
        match ends(&[".html", ".htm", ".xhtml"]) {
            true => Some(Self::Html),
            false => ends(&[".warc", ".warc.gz"]).then_some(Self::Warc),
        }
    }
}

/// Pages and archives below a folder; symbolic links are not followed.
fn list(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<(), Error> {
    for entry in folder.read_dir().map_err(Error::file(folder))? {
        let entry = entry.map_err(Error::file(folder))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(Error::file(folder))?);
        if kind.is_dir() {
            list(&path, paths)?;
        } else if kind.is_file() && Kind::of(&path).is_some() {
            paths.push(path);
        }
    }
    Ok(())
}

fn visit_file(root: &Path, path: &Path, visit: &mut Visit<'_>) -> Result<(), Error> {
    match Kind::of(path) {
        Some(Kind::Html) => visit_html(root, path, visit),
        Some(Kind::Warc) => visit_warc(path, visit),
        None => Ok(()),
    }
}

fn visit_html(root: &Path, path: &Path, visit: &mut Visit<'_>) -> Result<(), Error> {
    let root = if root.as_os_str().is_empty() { Path::new(".") } else { root };
    let relative = path.strip_prefix(root).unwrap_or(path);
    let mut files = Files { folder: Folder::open(root)? };
    let bytes = files.folder.read(relative, MAX_PAGE_BYTES);
    let base = file_address(relative);
    let document = bytes.zip(base).map(|(bytes, base)| Document {
        source: relative.to_string_lossy().replace('\\', "/"),
        base,
        html: html_from_bytes(&bytes, None),
    });
    visit(document.ok_or(PageReject::Unreadable), &mut files)
}

/// `sub/page.html` → `file:///sub/page.html`, so that no relative address leads out of the input.
fn file_address(relative: &Path) -> Option<Url> {
    let mut address = Url::parse("file:///").ok()?;
    let parts: Option<Vec<&str>> = relative.iter().map(|part| part.to_str()).collect();
    address.path_segments_mut().ok()?.clear().extend(parts?);
    Some(address)
}

struct Files {
    folder: Folder,
}

impl Fetch for Files {
    fn fetch(&mut self, address: &Url) -> Option<Vec<u8>> {
        if address.scheme() != "file" || address.has_host() {
            return None;
        }
        let path = percent_decode_str(address.path()).decode_utf8().ok()?;
        self.folder.read(Path::new(path.strip_prefix('/')?), MAX_PICTURE_BYTES)
    }
}

/// Twice through the archive: its pictures go to a temporary file, then its pages are visited.
fn visit_warc(path: &Path, visit: &mut Visit<'_>) -> Result<(), Error> {
    let mut file = File::open(path).map_err(Error::file(path))?;
    let mut pictures = warc::Pictures::new().map_err(Error::file(path))?;
    for resource in warc::resources(BufReader::new(&file)) {
        // Counted on the second way through.
        let Ok(resource) = resource else { continue };
        pictures.add(&resource).map_err(Error::file(path))?;
    }
    file.rewind().map_err(Error::file(path))?;
    for resource in warc::resources(BufReader::new(&file)) {
        match resource {
            Ok(resource) if resource.is_html() => visit(document_of(resource), &mut pictures)?,
            Ok(_) => {}
            Err(reason) => visit(Err(reason), &mut pictures)?,
        }
    }
    Ok(())
}

fn document_of(resource: warc::Resource) -> Result<Document, PageReject> {
    let base = Url::parse(&resource.address).map_err(|_| PageReject::Unreadable)?;
    if u64::try_from(resource.body.len()).is_ok_and(|len| len > MAX_PAGE_BYTES) {
        return Err(PageReject::Unreadable);
    }
    let html = html_from_bytes(&resource.body, resource.charset());
    Ok(Document { source: resource.address, base, html })
}

impl Fetch for warc::Pictures {
    fn fetch(&mut self, address: &Url) -> Option<Vec<u8>> {
        self.read(address)
    }
}

/// The bytes that an address in a page stands for: inside of it (`data:`), or found by `fetch`.
pub(super) fn bytes_at(address: &str, base: &Url, fetch: &mut dyn Fetch) -> Option<Vec<u8>> {
    if address.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:")) {
        let (bytes, _) = DataUrl::process(address).ok()?.decode_to_vec().ok()?;
        return Some(bytes);
    }
    let mut address = base.join(address).ok()?;
    address.set_fragment(None);
    if address.scheme() == "file" {
        address.set_query(None);
    }
    fetch.fetch(&address)
}

/// Text in the encoding of the byte order mark, of the header, of `<meta charset>`, in UTF-8 if it is
/// that, else in Windows-1252.
fn html_from_bytes(bytes: &[u8], header: Option<&str>) -> String {
    let named = header.map(str::as_bytes).or_else(|| meta_charset(bytes));
    let encoding =
        named.and_then(Encoding::for_label).unwrap_or_else(|| match std::str::from_utf8(bytes) {
            Ok(_) => UTF_8,
            Err(_) => WINDOWS_1252,
        });
    encoding.decode(bytes).0.into_owned()
}

/// What follows `charset=` in a `<meta>` near the beginning.
fn meta_charset(bytes: &[u8]) -> Option<&[u8]> {
    let beginning = bytes.get(..CHARSET_WITHIN).unwrap_or(bytes).to_ascii_lowercase();
    let meta = find(&beginning, b"<meta")?;
    let at = meta + find(&beginning[meta..], b"charset")? + b"charset".len();
    let is_label = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_:.+".contains(byte);
    let is_between = |byte: &u8| b"= \t\r\n\"'".contains(byte);
    let start = at + beginning[at..].iter().position(|byte| !is_between(byte))?;
    let len = beginning[start..].iter().take_while(|byte| is_label(byte)).count();
    bytes.get(start..start + len)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// At most `max_bytes` of a reader; `None` if there are more or it fails.
pub(super) fn read_at_most(reader: impl Read, max_bytes: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(max_bytes + 1).read_to_end(&mut bytes).ok()?;
    u64::try_from(bytes.len()).is_ok_and(|len| len <= max_bytes).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use url::Url;

    use super::{Fetch, bytes_at, html_from_bytes};

    #[test]
    fn encodings_are_found() {
        assert_eq!(html_from_bytes("é".as_bytes(), None), "é");
        assert_eq!(html_from_bytes(b"\xe9 \x93a\x94", None), "é “a”");
        assert_eq!(html_from_bytes(b"\xef\xbb\xbf\xc3\xa9", Some("latin1")), "é");
        assert!(html_from_bytes(b"<meta charset=\"koi8-r\">\xd1", None).ends_with('я'));
        let old = b"<META http-equiv=x content='text/html; charset=iso-8859-2'>\xb1";
        assert!(html_from_bytes(old, None).ends_with('ą'));
        assert_eq!(html_from_bytes(b"<meta charset=", None), "<meta charset=");
    }

    #[test]
    fn addresses_resolve_against_the_page() {
        struct Echo;
        impl Fetch for Echo {
            fn fetch(&mut self, address: &Url) -> Option<Vec<u8>> {
                Some(address.as_str().into())
            }
        }
        let check = |base: &str, address: &str, expected: &str| {
            let found = bytes_at(address, &Url::parse(base).unwrap(), &mut Echo).unwrap();
            assert_eq!(String::from_utf8(found).unwrap(), expected);
        };
        check("file:///a/b.html", "c d.png?v=1#x", "file:///a/c%20d.png");
        check("file:///a/b.html", "../../../../etc/passwd", "file:///etc/passwd");
        check("http://h/a/b", "//g/c.png?v=1#x", "http://g/c.png?v=1");
        check("http://h/a/b", "DATA:;base64,aGk=", "hi");
    }
}
