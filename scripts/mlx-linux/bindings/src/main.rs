//! Writes bindings.rs for mlx-sys from the mlx-c headers inside the mlx-sys package: `mlx-linux-bindings <mlx-c> <out>`.

use std::{env, fs, path::Path};

/// mlx-c hides the half types where the compiler has none of its own; mlx-rs wants them everywhere.
const HALVES: &str = r#"
#[repr(transparent)]
#[derive(Default, Copy, Clone, Debug)]
pub struct float16_t(pub u16);
pub type bfloat16_t = u16;
unsafe extern "C" {
    pub fn mlx_array_item_float16(res: *mut float16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_item_bfloat16(res: *mut bfloat16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_data_float16(arr: mlx_array) -> *const float16_t;
    pub fn mlx_array_data_bfloat16(arr: mlx_array) -> *const bfloat16_t;
}
"#;

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let [_, root, out] = arguments.as_slice() else {
        panic!("usage: mlx-linux-bindings <mlx-c folder> <bindings.rs>");
    };
    let folder = Path::new(root).join("mlx/c");
    let mut headers: Vec<_> = fs::read_dir(&folder)
        .expect("the mlx-c headers")
        .map(|entry| entry.expect("a header").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "h"))
        .collect();
    headers.sort();
    let builder = bindgen::Builder::default()
        .rust_target("1.73.0".parse().expect("a Rust version"))
        .clang_arg(format!("-I{root}"))
        .blocklist_function("malloc")
        .blocklist_function("realloc");
    let builder = headers.iter().fold(builder, |builder, header| builder.header(header.to_string_lossy()));
    let mut text = builder.generate().expect("bindings").to_string();
    if !text.contains("float16_t") {
        text.push_str(HALVES);
    }
    fs::write(out, text).expect("write the bindings");
}
