//! The bad files of the catalogue (items 56-67 of the reliability notes), one by one.

use super::*;
use std::path::PathBuf;

fn file_of(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn read(bytes: &[u8]) -> Result<TensorHeader, WeightFileError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    read_header(&path)
}

fn refused(header: &str, data_bytes: usize) -> WeightFileError {
    let error = read(&file_of(header, data_bytes)).unwrap_err();
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    error
}

#[test]
fn a_good_file_is_described() {
    let header = r#"{"__metadata__":{"format":"mlx"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
        "a":{"dtype":"U32","shape":[],"data_offsets":[0,4]},
        "z":{"dtype":"F32","shape":[0,7],"data_offsets":[16,16]}}"#;
    let parsed = read(&file_of(header, 16)).unwrap();
    let data_start = 8 + header.len() as u64;
    assert_eq!(parsed.file_bytes, data_start + 16);
    assert_eq!(parsed.tensors.len(), 3);
    assert_eq!(parsed.tensors["a"], TensorSlot { dtype: DType::U32, shape: vec![], offset: data_start, bytes: 4 });
    assert_eq!(parsed.tensors["b"], TensorSlot { dtype: DType::BF16, shape: vec![2, 3], offset: data_start + 4, bytes: 12 });
    assert_eq!(parsed.tensors["z"].bytes, 0);
}

#[test]
fn metadata_may_be_null_as_mlx_writes_it() {
    let header = r#"{"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    assert_eq!(read(&file_of(header, 1)).unwrap().tensors.len(), 1);
}

#[test]
fn what_the_safetensors_crate_writes_is_read() {
    let data = [0u8; 24];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &data).unwrap();
    let bytes = safetensors::serialize([("weight", view)], None).unwrap();
    assert_eq!(read(&bytes).unwrap().tensors["weight"].shape, [2, 3]);
    let empty = safetensors::serialize(Vec::<(String, safetensors::tensor::TensorView<'_>)>::new(), None).unwrap();
    assert!(read(&empty).unwrap().tensors.is_empty());
}

#[test]
fn item_56_too_short() {
    for bytes in [&b""[..], b"1234567"] {
        let expected = bytes.len() as u64;
        assert!(matches!(read(bytes), Err(WeightFileError::TooShort { bytes, .. }) if bytes == expected));
    }
    assert!(matches!(read_header(&PathBuf::from("/nonexistent/model.safetensors")), Err(WeightFileError::Unreadable { .. })));
}

#[test]
fn item_57_header_length_is_absurd() {
    let bytes = (1u64 << 62).to_le_bytes();
    assert!(matches!(read(&bytes), Err(WeightFileError::HeaderTooLarge { .. })));
    let bytes = u64::MAX.to_le_bytes();
    assert!(matches!(read(&bytes), Err(WeightFileError::HeaderTooLarge { .. })));
}

#[test]
fn item_58_header_past_the_end() {
    let mut bytes = 1000u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}");
    assert!(matches!(read(&bytes), Err(WeightFileError::Incomplete { has_bytes: 10, needed_bytes: 1008, .. })));
}

#[test]
fn item_59_data_truncated_or_absent() {
    let header = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    for data_bytes in [0, 15] {
        let message = refused(header, data_bytes).to_string();
        let (has, needed) = (8 + header.len() + data_bytes, 8 + header.len() + 16);
        assert!(message.contains(&format!("incomplete download: it has {has} of {needed} bytes")), "{message}");
    }
}

#[test]
fn item_60_shape_does_not_match_the_bytes() {
    let error = refused(r#"{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}"#, 16);
    assert!(matches!(error, WeightFileError::SizeMismatch { expected_bits: 160, found_bytes: 16, .. }), "{error}");
    // Three 4-bit elements end in the middle of a byte.
    refused(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2);
}

#[test]
fn item_61_shape_overflows() {
    let error = refused(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0);
    assert!(matches!(error, WeightFileError::ShapeOverflow { .. }), "{error}");
}

#[test]
fn item_62_negative_dimension() {
    let error = refused(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4);
    assert!(matches!(&error, WeightFileError::MalformedTensor { tensor, .. } if tensor == "a"), "{error}");
}

#[test]
fn item_63_offsets_reversed_or_out_of_range() {
    let error = refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4);
    assert!(matches!(error, WeightFileError::ReversedOffsets { .. }), "{error}");
    let error = refused(r#"{"a":{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]}}"#, 4);
    assert!(matches!(error, WeightFileError::ShapeOverflow { .. } | WeightFileError::Incomplete { .. }), "{error}");
    let error = refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8);
    assert!(matches!(error, WeightFileError::Gap { .. }), "{error}");
}

#[test]
fn item_64_tensors_overlap() {
    let error =
        refused(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, 12);
    assert!(matches!(&error, WeightFileError::Overlap { tensor, start: 4, previous_end: 8, .. } if tensor == "b"), "{error}");
    refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4);
}

#[test]
fn item_65_trailing_bytes() {
    let error = refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 9);
    assert!(matches!(error, WeightFileError::TrailingBytes { extra_bytes: 5, .. }), "{error}");
}

#[test]
fn item_66_duplicate_names() {
    // The second pair has no data, so that the crate's own check for gaps would not notice.
    for tensor in [r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#] {
        let error = refused(&format!(r#"{{"a":{tensor},"a":{tensor}}}"#), 4);
        assert!(matches!(&error, WeightFileError::DuplicateTensor { tensor, .. } if tensor == "a"), "{error}");
    }
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, 0);
}

#[test]
fn item_67_header_is_not_what_it_should_be() {
    for header in [
        r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1]}}"#,
        r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#,
        r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999]}}"#,
        r#"{"a":7}"#,
        r#"{"__metadata__":7}"#,
        "[]",
        "not json",
        "",
        "\u{1}",
        "{} {}",
    ] {
        refused(header, 4);
    }
    assert!(matches!(read(&file_of("{\"a\": \u{fffd}", 0)), Err(WeightFileError::HeaderNotJson { line: 1, .. })));
    let mut not_utf8 = file_of("{\"aa\":1}", 0);
    not_utf8[10] = 0xff;
    assert!(matches!(read(&not_utf8), Err(WeightFileError::HeaderNotJson { .. })));
}

#[test]
fn item_67_deep_nesting_is_an_error_not_a_crash() {
    let deep = "[".repeat(100_000);
    refused(&deep, 0);
    refused(&format!(r#"{{"a":{deep}"#), 0);
    refused(&format!(r#"{{"a":{deep}{}}}"#, "]".repeat(100_000)), 0);
    let extra = format!("{deep}{}", "]".repeat(100_000));
    let _ = read(&file_of(&format!(r#"{{"a":{{"x":{extra},"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#), 4));
}

#[test]
fn an_element_type_without_support_is_named() {
    let error = refused(r#"{"a":{"dtype":"F8_E4M3FNUZ","shape":[4],"data_offsets":[0,4]}}"#, 4);
    assert!(error.to_string().contains("F8_E4M3FNUZ"), "{error}");
}

#[test]
fn files_that_are_something_else_are_recognised() {
    assert!(matches!(read(b"<!DOCTYPE html><html></html>"), Err(WeightFileError::WebPage { .. })));
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n";
    assert!(matches!(read(pointer), Err(WeightFileError::LfsPointer { .. })));
    // A header of 60 bytes starts with `<` too, and is fine.
    let header = format!("{:60}", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#);
    assert!(read(&file_of(&header, 4)).is_ok());
}
