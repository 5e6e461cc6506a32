//! Small ELF libraries, laid out by hand after the System V ABI, and fat binaries to put into them.

/// `e_machine` of x86-64.
pub(crate) const X86_64: u16 = 62;
/// `e_machine` of aarch64.
pub(crate) const AARCH64: u16 = 183;

/// Bytes of the file's header, which are those of a section's header, too.
const HEADER_BYTES: usize = 64;

/// A library of 64 bits, little endian.
pub(crate) struct ElfFile<'a> {
    /// Processor.
    pub(crate) machine: u16,
    /// Libraries that it needs.
    pub(crate) needed: &'a [&'a str],
    /// Its own name.
    pub(crate) soname: Option<&'a str>,
    /// Where the loader looks for what it and its libraries need.
    pub(crate) rpath: Option<&'a str>,
    /// Where the loader looks for what it needs.
    pub(crate) runpath: Option<&'a str>,
    /// Further sections, by name.
    pub(crate) sections: &'a [(&'a str, &'a [u8])],
}

impl Default for ElfFile<'_> {
    fn default() -> Self {
        ElfFile {
            machine: X86_64,
            needed: &[],
            soname: None,
            rpath: None,
            runpath: None,
            sections: &[],
        }
    }
}

impl ElfFile<'_> {
    /// The file: header, contents of sections, headers of sections.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (strings, dynamic) = self.dynamic();
        let mut sections: Vec<(&str, u32, u32, &[u8])> =
            vec![("", 0, 0, &[]), (".dynstr", 3, 0, &strings), (".dynamic", 6, 1, &dynamic)];
        sections.extend(self.sections.iter().map(|(name, bytes)| (*name, 1, 0, *bytes)));
        let mut names = Vec::new();
        let offsets: Vec<usize> =
            sections.iter().map(|(name, ..)| add_string(&mut names, name)).collect();
        let own_name = add_string(&mut names, ".shstrtab");
        sections.push((".shstrtab", 3, 0, &names));

        let (mut file, mut headers) = (vec![0; HEADER_BYTES], Vec::new());
        for (index, (_, kind, link, bytes)) in sections.iter().enumerate() {
            let name = offsets.get(index).copied().unwrap_or(own_name);
            file.resize(file.len().next_multiple_of(8), 0);
            let size = if *kind == 0 { (0, 0) } else { (file.len(), bytes.len()) };
            headers.extend(section_header(name, *kind, size, *link));
            file.extend(*bytes);
        }
        file.resize(file.len().next_multiple_of(8), 0);
        let header = self.header(file.len(), sections.len());
        file[..HEADER_BYTES].copy_from_slice(&header);
        file.extend(headers);
        file
    }

    /// The string table and the entries that refer to it.
    fn dynamic(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut strings, mut entries) = (vec![0], Vec::new());
        let tagged = self.needed.iter().map(|name| (1u64, *name));
        let single = [(14, self.soname), (15, self.rpath), (29, self.runpath)];
        let single = single.into_iter().filter_map(|(tag, text)| Some((tag, text?)));
        for (tag, text) in tagged.chain(single) {
            entries.extend(tag.to_le_bytes());
            entries.extend((add_string(&mut strings, text) as u64).to_le_bytes());
        }
        entries.extend([0; 16]);
        (strings, entries)
    }

    fn header(&self, sections_at: usize, n_sections: usize) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &3u16.to_le_bytes());
        put(18, &self.machine.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(40, &(sections_at as u64).to_le_bytes());
        put(52, &(HEADER_BYTES as u16).to_le_bytes());
        put(58, &(HEADER_BYTES as u16).to_le_bytes());
        put(60, &(n_sections as u16).to_le_bytes());
        put(62, &(n_sections as u16 - 1).to_le_bytes());
        header
    }
}

fn section_header(name: usize, kind: u32, (at, n_bytes): (usize, usize), link: u32) -> [u8; 64] {
    let mut header = [0; HEADER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(name as u32).to_le_bytes());
    put(4, &kind.to_le_bytes());
    put(24, &(at as u64).to_le_bytes());
    put(32, &(n_bytes as u64).to_le_bytes());
    put(40, &link.to_le_bytes());
    put(48, &8u64.to_le_bytes());
    header
}

/// Appends a string with its NUL and gives its offset.
fn add_string(strings: &mut Vec<u8>, text: &str) -> usize {
    let at = strings.len();
    strings.extend(text.bytes().chain([0]));
    at
}

/// A fat binary of entries of a kind (1 PTX, 2 machine code), an architecture, and bytes of code.
pub(crate) fn fat_binary(entries: &[(u16, u32, usize)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, architecture, n_bytes) in entries {
        let padded = n_bytes.next_multiple_of(8);
        let mut header = [0; 64];
        header[..2].copy_from_slice(&kind.to_le_bytes());
        header[2..4].copy_from_slice(&0x101u16.to_le_bytes());
        header[4..8].copy_from_slice(&64u32.to_le_bytes());
        header[8..16].copy_from_slice(&(padded as u64).to_le_bytes());
        header[28..32].copy_from_slice(&architecture.to_le_bytes());
        body.extend(header);
        body.resize(body.len() + padded, 0xcd);
    }
    let mut binary = 0xba55_ed50u32.to_le_bytes().to_vec();
    binary.extend(1u16.to_le_bytes());
    binary.extend(16u16.to_le_bytes());
    binary.extend((body.len() as u64).to_le_bytes());
    binary.extend(body);
    binary
}
