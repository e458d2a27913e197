//! Reading of every kind, and what is refused.

use super::*;
use crate::config::{Config, ConfigError};
use serde_json::{Value, json};

fn initialize(dims: u32, theta: f32, scaling: Value, context: Option<u32>) -> Result<RopeKind, ConfigError> {
    let scaling = Config::new(&scaling)?;
    RopeSpec::initialize(dims, theta, false, Some(&scaling), context, "test").map(|spec| spec.kind)
}

fn read(config: Value) -> Result<RopeSpec, ConfigError> {
    RopeSpec::from_config(&Config::new(&config)?, "test", 8, None)
}

fn message<T: std::fmt::Debug>(result: Result<T, ConfigError>) -> String {
    result.expect_err("refused").to_string()
}

#[test]
fn every_kind_is_read() {
    let kind = |scaling| initialize(8, 1e4, scaling, Some(64)).expect("valid");
    assert_eq!(kind(json!({})), RopeKind::Default);
    assert_eq!(kind(json!({"type": "default", "mrope_section": [1]})), RopeKind::Default);
    assert_eq!(kind(json!({"type": "mrope", "mrope_section": [1, 1, 2]})), RopeKind::Default);
    assert_eq!(kind(json!({"type": "linear", "rope_type": "yarn", "factor": 2})), RopeKind::Linear { factor: 2.0 });
    assert_eq!(kind(json!({"rope_type": "dynamic", "factor": 2})), RopeKind::DynamicNtk { factor: 2.0, max_position_embeddings: 64 });
    let llama3 = RopeKind::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    assert_eq!(kind(json!({"rope_type": "llama3", "factor": 8})), llama3);
    for name in ["yarn", "deepseek_yarn", "telechat3-yarn"] {
        let yarn =
            RopeKind::Yarn { factor: 4.0, beta_fast: 16.0, beta_slow: 1.0, mscale: 0.707, mscale_all_dim: 0.0, original_context: 4096 };
        assert_eq!(kind(json!({"type": name, "factor": 4, "beta_fast": 16, "mscale": 0.707, "truncate": false})), yarn);
    }
    let long = |factors: Vec<f32>| RopeKind::LongRope { factors, max_position_embeddings: 64, original_context: 32 };
    let original = "original_max_position_embeddings";
    assert_eq!(kind(json!({"type": "longrope", "long_factor": [1, 2, 3, 4.5], original: 32})), long(vec![1.0, 2.0, 3.0, 4.5]));
    assert_eq!(kind(json!({"type": "su", "long_factor": 2, original: 32})), long(vec![2.0; 4]));
    let proportional = |rotated_dims, factor| RopeKind::Proportional { rotated_dims, factor };
    assert_eq!(kind(json!({"type": "proportional"})), proportional(8, 1.0));
    assert_eq!(kind(json!({"type": "proportional", "partial_rotary_factor": 0.4, "factor": 2})), proportional(3, 2.0));
}

#[test]
fn what_a_kind_cannot_have_is_refused() {
    let refused = |dims, theta, scaling| message(initialize(dims, theta, scaling, None));
    assert!(refused(8, 1e4, json!({"type": "spiral"})).contains("`spiral`"));
    assert!(refused(7, 1e4, json!({})).contains("even"));
    assert!(refused(0, 1e4, json!({})).contains("even"));
    assert!(refused(8, f32::NAN, json!({})).contains("theta"));
    assert!(refused(8, 1.0, json!({"type": "yarn", "factor": 2})).contains("theta above 1"));
    assert!(refused(8, 1e4, json!({"type": "yarn", "factor": 2, "beta_fast": 0})).contains("beta_fast"));
    assert!(refused(8, 1e4, json!({"type": "yarn", "factor": 2, "attention_factor": 1.0})).contains("attention_factor"));
    assert!(refused(8, 1e4, json!({"type": "linear"})).contains("factor"));
    assert!(refused(8, 1e4, json!({"type": "llama3", "factor": 2, "low_freq_factor": 0})).contains("low_freq_factor"));
    assert!(refused(8, 1e4, json!({"type": "mrope", "mrope_section": [1, 3]})).contains("mrope_section"));
    assert!(refused(8, 1e4, json!({"type": "dynamic", "factor": 2})).contains("max_position_embeddings"));
    assert!(refused(8, 1e4, json!({"type": "proportional", "partial_rotary_factor": 1.5})).contains("partial_rotary_factor"));
    assert!(message(initialize(2, 1e4, json!({"type": "dynamic", "factor": 2}), Some(8))).contains("more than 2"));
    let long = |factors: Value, original: u32| {
        let scaling = json!({"type": "longrope", "long_factor": factors, "original_max_position_embeddings": original});
        message(initialize(8, 1e4, scaling, Some(64)))
    };
    assert!(long(json!([1, 2, 3]), 32).contains("long_factor has 3"));
    assert!(long(json!([1, 2, 3, 0]), 32).contains("long_factor"));
    assert!(long(json!([1, 2, 3, 4]), 1).contains("original_max_position_embeddings"));
    let given = json!({"type": "yarn", "factor": 8, "attention_factor": 1.2079441541679836});
    assert!(initialize(8, 1e4, given, None).is_ok());
}

#[test]
fn theta_and_scaling_stand_at_the_top_or_nested() {
    let linear = RopeKind::Linear { factor: 2.0 };
    let nested = read(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}})).expect("valid");
    assert_eq!((nested.theta, nested.kind), (5e5, linear.clone()));
    let top = read(json!({"rope_theta": 100, "rope_traditional": true, "rope_scaling": {"type": "linear", "factor": 2}})).expect("valid");
    assert_eq!(top, RopeSpec { dims: 8, interleaved: true, theta: 100.0, kind: linear });
    assert_eq!(read(json!({})), Err(ConfigError::Missing { key: "rope_theta".into() }));
    assert!(message(read(json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}))).contains("rope_parameters.rope_theta"));
    assert!(message(read(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}))).contains("differs by layer"));
}

#[test]
fn an_architecture_without_scaling_refuses_it() {
    let unscaled = |config: Value| RopeSpec::unscaled(&Config::new(&config)?, "test", 8, Some(1e4), true);
    assert_eq!(unscaled(json!({"rope_scaling": {"type": "default"}})), RopeSpec::plain(8, 1e4, true));
    assert_eq!(unscaled(json!({"rope_parameters": {"rope_theta": 1e6}})), RopeSpec::plain(8, 1e6, true));
    assert!(message(unscaled(json!({"rope_scaling": {"type": "yarn", "factor": 2}}))).contains("yarn"));
}

#[test]
fn each_layer_type_has_its_own() {
    let config = json!({"rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "partial_rotary_factor": 0.5},
    }});
    let config = Config::new(&config).expect("an object");
    let rope = |layer_type, theta| RopeSpec::for_layer_type(&config, "test", 16, layer_type, theta, false);
    let kind = RopeKind::Proportional { rotated_dims: 4, factor: 1.0 };
    assert_eq!(rope("full_attention", None), Ok(Some(RopeSpec { dims: 16, interleaved: false, theta: 1e6, kind })));
    assert!(message(rope("sliding_attention", None)).contains("rope_parameters.sliding_attention.rope_theta"));
    assert!(message(rope("sliding_attention", Some(1e4))).contains("partial_rotary_factor"));
    assert!(message(rope("chunked_attention", Some(1e4))).contains("chunked_attention"));
    let empty = json!({});
    assert_eq!(RopeSpec::for_layer_type(&Config::new(&empty).expect("an object"), "test", 16, "full_attention", None, false), Ok(None));
}

#[test]
fn alpha_and_partial_dimensions() {
    let scaling = json!({"type": "dynamic", "alpha": 1000, "factor": 1.0});
    let scaling = Config::new(&scaling).expect("an object");
    let alpha = |scaling| RopeSpec::ntk_alpha(8, 1e4, false, scaling).map(|spec| spec.kind);
    assert_eq!(alpha(Some(&scaling)), Ok(RopeKind::NtkAlpha { alpha: 1000.0 }));
    assert_eq!(alpha(None), Ok(RopeKind::NtkAlpha { alpha: 1.0 }));
    assert!(RopeSpec::ntk_alpha(2, 1e4, false, None).is_err());
    assert_eq!(rotary_dims(80, 0.7), Ok(56));
    assert_eq!(rotary_dims(128, 1.0), Ok(128));
    for factor in [0.0, 0.01, 0.04, 1.5, f64::NAN] {
        assert!(rotary_dims(80, factor).is_err(), "{factor}");
    }
}

#[test]
fn magnitudes() {
    let magnitude = |scaling| initialize(8, 1e4, scaling, Some(131_072)).expect("valid").magnitude();
    let near = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-12, "{found} {wanted}");
    near(magnitude(json!({"type": "yarn", "factor": 32})), 1.346_573_590_279_972_7);
    near(magnitude(json!({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0})), 1.0);
    near(magnitude(json!({"type": "yarn", "factor": 0.5})), 1.0);
    near(magnitude(json!({"type": "longrope", "original_max_position_embeddings": 4096})), 1.190_238_071_423_808_3);
    let attention = |scaling: Value| yarn_attention_factor(Some(&Config::new(&scaling).expect("an object"))).expect("valid");
    near(attention(json!({"type": "yarn", "factor": 40, "mscale_all_dim": 1})), 1.873_854_207_092_626_5);
    near(attention(json!({"type": "yarn", "factor": 40})), 1.0);
    near(attention(json!({"factor": 40, "mscale_all_dim": 1})), 1.0);
}
