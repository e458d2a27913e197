//! Rendering against what Hugging Face transformers makes of the same templates, and templates that mean harm.

use std::time::Instant;

use serde_json::json;

use super::*;

fn render(source: &str) -> Result<String, TemplateError> {
    let messages = [json!({"role": "user", "content": "hi"})];
    ChatTemplate::new(source)?.render(&messages, None, true, &Map::new(), &SpecialTokens::default())
}

#[test]
fn renders_what_transformers_renders() {
    let golden: Value = serde_json::from_str(include_str!("golden.json")).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let (messages, tools) = (list(&golden["messages"]), list(&golden["tools"]));
    let mut wrong = Vec::new();
    for case in list(&golden["cases"]) {
        let tools = case["tools"].as_bool().unwrap().then_some(tools.as_slice());
        let rendered = ChatTemplate::new(case["template"].as_str().unwrap())
            .and_then(|template| template.render(&messages, tools, true, golden["kwargs"].as_object().unwrap(), &SpecialTokens::default()));
        match rendered {
            Ok(text) if text == case["expected"].as_str().unwrap() => {}
            other => wrong.push(format!("{}\n  got  {other:?}\n  want {}", case["name"], case["expected"])),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn special_tokens_are_defined_only_when_the_model_has_them() {
    let template = ChatTemplate::new("{{ bos_token }}{% if eos_token is defined %}{{ eos_token }}{% endif %}").unwrap();
    let special = SpecialTokens::from_iter([("bos_token", "<s>")]);
    let rendered = template.render(&[], None, false, &Map::new(), &special).unwrap();
    assert_eq!(rendered, "<s>");
}

#[test]
fn arguments_cannot_be_replaced_by_extra_variables() {
    let template = ChatTemplate::new("{{ messages | length }}{{ add_generation_prompt }}{{ x }}").unwrap();
    let extra = json!({"messages": [1, 2], "add_generation_prompt": true, "x": "y"});
    let rendered = template.render(&[], None, false, extra.as_object().unwrap(), &SpecialTokens::default()).unwrap();
    assert_eq!(rendered, "0Falsey");
}

#[test]
fn sources_are_taken_in_order() {
    let text = |text: &str| Some(text.to_owned());
    let mut sources = TemplateSources {
        jinja: text("from jinja"),
        json: text(r#"{"chat_template": "from json"}"#),
        tokenizer_config: text(
            r#"{"chat_template": [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "plain"}]}"#,
        ),
    };
    let chosen = |sources: &TemplateSources, tools| ChatTemplate::from_sources(sources).unwrap().unwrap().source(tools).to_owned();
    assert_eq!(chosen(&sources, true), "from jinja");
    sources.jinja = None;
    assert_eq!(chosen(&sources, true), "from json");
    sources.json = text("{}");
    assert_eq!((chosen(&sources, true), chosen(&sources, false)), ("with tools".to_owned(), "plain".to_owned()));
    let tools = [json!({"type": "function"})];
    let render = |tools: Option<&[Value]>| {
        let template = ChatTemplate::from_sources(&sources).unwrap().unwrap();
        template.render(&[], tools, true, &Map::new(), &SpecialTokens::default()).unwrap()
    };
    assert_eq!((render(Some(&tools)), render(Some(&[])), render(None)), ("with tools".into(), "plain".into(), "plain".into()));
    assert!(ChatTemplate::from_sources(&TemplateSources::default()).unwrap().is_none());
    for bad in [r#"{"chat_template": 5}"#, r#"{"chat_template": [{"name": "rag", "template": ""}]}"#, "<html>"] {
        let sources = TemplateSources { json: text(bad), ..TemplateSources::default() };
        assert!(matches!(ChatTemplate::from_sources(&sources), Err(TemplateError::BadSource { file: "chat_template.json", .. })));
    }
}

#[test]
fn a_folder_is_read() {
    let folder = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::load(folder.path()).unwrap().is_none());
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"chat_template": "a"}"#).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "b").unwrap();
    assert_eq!(ChatTemplate::load(folder.path()).unwrap().unwrap().source(false), "b");
}

#[test]
fn the_words_of_raise_exception_are_kept() {
    let source = "{% macro no(m) %}{{ raise_exception('Roles must alternate, not ' + m.role) }}{% endmacro %}{{ no(messages[0]) }}";
    match render(source) {
        Err(TemplateError::Raised { message }) => assert_eq!(message, "Roles must alternate, not user"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn mistakes_name_cause_and_line() {
    let failed = render("\n{{ messages | nonsense }}").unwrap_err();
    assert!(matches!(&failed, TemplateError::Failed { message } if message.contains("nonsense") && message.contains("line 2")), "{failed}");
    let syntax = ChatTemplate::new("a\n\n{% if %}").unwrap_err();
    assert!(matches!(&syntax, TemplateError::Syntax { message } if message.contains("line 3")), "{syntax}");
    assert!(matches!(render("{{ missing.attribute }}"), Err(TemplateError::Failed { .. })));
    assert!(matches!(render("{{ missing() }}"), Err(TemplateError::Failed { .. })));
    assert!(matches!(render("{{ missing | tojson }}"), Err(TemplateError::Failed { .. })));
    assert!(matches!(render("{% include '/etc/passwd' %}"), Err(TemplateError::Failed { .. })));
}

#[test]
fn nothing_of_python_is_reachable() {
    assert_eq!(render("[{{ messages.__class__ }}][{{ ''.__class__ }}][{{ cycler }}][{{ self }}]").unwrap(), "[][][][]");
    assert!(render("{{ ''.__class__.__mro__ }}").is_err());
    assert!(render("{{ cycler.__init__ }}").is_err());
}

#[test]
fn the_date_is_formatted() {
    let year = render("{{ strftime_now('%Y') }}").unwrap();
    assert!(year.len() == 4 && year.starts_with("20"), "{year}");
    assert!(matches!(render("{{ strftime_now('%!') }}"), Err(TemplateError::Failed { .. })));
}

#[track_caller]
fn exceeds_budget(source: &str) {
    let started = Instant::now();
    let outcome = render(source);
    let shown = &source[..source.len().min(120)];
    assert!(matches!(outcome, Err(TemplateError::Budget { .. })), "{shown}: {:?}", outcome.map(|text| text.len()));
    // A little more than the limit: two slow cores are shared by many tests.
    assert!(started.elapsed().as_millis() < 2500, "{shown}: {:?}", started.elapsed());
}

#[test]
fn endless_work_is_ended() {
    exceeds_budget(
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
    );
    exceeds_budget("{% for a in range(10**9) %}{% endfor %}");
    exceeds_budget("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}");
    exceeds_budget("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}");
}

#[test]
fn large_texts_are_refused() {
    exceeds_budget("{{ 'x' * 10**9 }}");
    exceeds_budget("{{ 'x' * 10**8 }}");
    for operation in [
        "ns.s ~ ns.s",
        "ns.s + ns.s",
        "ns.s * 10",
        "ns.s.replace('x', ns.s)",
        "ns.s | replace('x', 'xx')",
        "[ns.s, ns.s] | join",
        "''.join([ns.s, ns.s])",
        "'%s%s' | format(ns.s, ns.s)",
        "'{0}{0}'.format(ns.s)",
    ] {
        exceeds_budget(&format!(
            "{{% set ns = namespace(s='xx') %}}{{% for a in range(99) %}}{{% set ns.s = {operation} %}}{{% endfor %}}"
        ));
    }
    exceeds_budget(&"{% set s = (s or 'x') ~ (s or 'x') %}".repeat(50));
    exceeds_budget("{% macro m(s, n) %}{{ m(s ~ s, n - 1) if n else s }}{% endmacro %}{{ m('xxxxxxxx', 40) }}");
    exceeds_budget("{% for a in range(100000) %}{% for b in range(1000) %}text text text text text text text{% endfor %}{% endfor %}");
    exceeds_budget(
        "{% set x %}{% for a in range(100000) %}{% for b in range(1000) %}text text text text text text text{% endfor %}{% endfor %}{% endset %}",
    );
    exceeds_budget("{{ 'a' | indent(10**9) }}{{ 'a\nb' | indent(width=10**9) }}");
    exceeds_budget("{{ '%1000000000d' | format(1) }}");
    exceeds_budget("{{ '{:1000000000}'.format(1) }}");
    exceeds_budget("{{ 'a'.ljust(10**9) }}");
    exceeds_budget(&format!("{{{{ '{}' | replace('x', '{}') }}}}", "x".repeat(7000), "y".repeat(7000)));
}

#[test]
fn lists_that_multiply_or_nest_are_refused() {
    let bombs = [
        "{% set ns.l = [ns.l, ns.l] %}",
        "{% set ns.l = [ns.l] %}",
        "{% set ns.l = {'a': ns.l, 'b': ns.l} %}",
        "{% set ns.l = (ns.l, ns.l) %}",
        "{% set ns.l = ns.l + ns.l %}",
        "{% set ns.l = ns.l * 10 %}",
        "{% set ns.l = ns.l + ['x' * 8000000] %}",
        "{% set ns.l = dict(a=ns.l, b=ns.l) %}",
    ];
    for bomb in bombs {
        let build = |times: u32| format!("{{% set ns = namespace(l=[1]) %}}{{% for i in range({times}) %}}{bomb}{{% endfor %}}");
        exceeds_budget(&build(100_000));
        for after in ["{{ ns.l }}", "{{ ns.l == ns.l }}", "{{ ns.l | tojson }}", "{{ ns.l ~ '' }}", "{{ [ns.l, ns.l] | sort | join }}"] {
            let started = Instant::now();
            match render(&(build(15) + after)) {
                Ok(_) | Err(TemplateError::Budget { .. } | TemplateError::Failed { .. }) => {}
                other => panic!("{bomb} {after}: {other:?}"),
            }
            assert!(started.elapsed().as_millis() < 2500, "{bomb} {after}: {:?}", started.elapsed());
        }
    }
    exceeds_budget("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}");
    exceeds_budget("{% set ns = namespace() %}{% set ns.me = [ns] %}{{ ns }}");
    exceeds_budget("{{ [1] * 10**9 }}");
}

#[test]
fn deep_and_long_sources_are_refused() {
    exceeds_budget(&format!("{}x{}", "{% if 1 %}".repeat(10_000), "{% endif %}".repeat(10_000)));
    exceeds_budget(&format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)));
    exceeds_budget(&format!("{{{{ 1{} }}}}", "+1".repeat(10_000)));
    assert!(matches!(render(&"x".repeat(MAX_SOURCE_BYTES + 1)), Err(TemplateError::SourceTooLong { .. })));
}

#[test]
fn the_deepest_allowed_sources_do_not_overflow_the_stack() {
    assert_eq!(render(&format!("{{{{ 1{} }}}}", "+1".repeat(8000))).unwrap(), "8001");
    assert_eq!(render("{{ messages.a }}").unwrap(), "");
    let _ = render(&format!("{{{{ messages{} }}}}", ".a".repeat(8000)));
    let _ = render(&format!("{{{{ {}1 }}}}", "not ".repeat(4000)));
    let _ = render(&format!("{{{{ {}1 }}}}", "-".repeat(8000)));
    let _ = render(&format!("{{{{ 1{} }}}}", "|abs".repeat(4000)));
    let _ = render(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(20_000)));
    let _ = render(&format!("{{{{ 1 {} }}}}", "if 1 else 2 ".repeat(1200)));
}

#[test]
fn a_long_conversation_stays_within_the_budget() {
    let template = ChatTemplate::new(
        "{% for m in messages %}{% set text = '<|im_start|>' + m.role + '\n' + (m.content | trim) ~ '<|im_end|>\n' %}{{ text }}{% endfor %}",
    );
    let messages: Vec<Value> = (0..2000).map(|_| json!({"role": "user", "content": "word ".repeat(400)})).collect();
    let rendered = template.unwrap().render(&messages, None, true, &Map::new(), &SpecialTokens::default()).unwrap();
    assert!(rendered.len() > 2000 * 1999);
}
