//! x
use mlx_rs::Array;
pub fn t() -> f32 { let a = Array::from_slice(&[1.0f32,2.0],&[2]); mlx_rs::ops::add(&a,&a).unwrap().sum(None).unwrap().item_exact::<f32>() }
#[cfg(test)] mod tests { #[test] fn t() { assert_eq!(super::t(), 6.0); } }
