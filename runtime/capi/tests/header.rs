//! The header is what the code says.

use std::path::Path;

#[test]
fn the_header_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = root.join("include/flamingo.h");
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("a configuration");
    let builder = cbindgen::Builder::new().with_src(root.join("src/ffi.rs")).with_config(config);
    let mut header = Vec::new();
    builder.generate().expect("bindings").write(&mut header);
    let header = String::from_utf8(header).expect("a text");
    if std::env::var_os("FLAMINGO_WRITE_HEADER").is_some() {
        std::fs::write(&file, &header).expect("the header can be written");
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == header,
        "{} is not what src/ffi.rs says; write it: FLAMINGO_WRITE_HEADER=1 cargo test -p flamingo-capi",
        file.display()
    );
}
