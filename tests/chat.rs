//! Conversations: the text of transformers, the loss on every assistant turn and on nothing else, templates that fail.

mod support;

use std::path::Path;

use fastlora::config::{DataSource, HashTemplate, LossOn, OnBadRecord, Overlong};
use fastlora::data::{
    ChatTemplate, Conversation, LoadOptions, RecordContent, RenderFault, TemplateChoice, load,
};
use fastlora::error::{Error, ErrorKind, Result};
use fastlora::tokens::{NO_LOSS, SampleOptions, SampleSet, Tokenizer, tokenise};
use serde_json::{Map, Value, json};

use crate::support::fixture;

fn cases() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("chat/cases.json")).unwrap()).unwrap()
}

/// A template of the fixture with its variables and its day.
fn family(cases: &Value, name: &str) -> ChatTemplate {
    let source = cases["templates"][name].as_str().unwrap();
    let special_tokens = cases["special_tokens"].as_object().unwrap().clone();
    let date = cases["date"].as_str().unwrap().parse().unwrap();
    ChatTemplate::new(source, name, special_tokens, Some(date)).unwrap()
}

fn template(source: &str) -> Result<ChatTemplate> {
    ChatTemplate::new(source, "chat_template.jinja", Map::new(), None)
}

/// The conversation of one record, by way of the loader.
fn conversation(record: &Value) -> Conversation {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.jsonl");
    std::fs::write(&path, record.to_string()).unwrap();
    let dataset = load(&[DataSource::new(path)], &LoadOptions::default()).unwrap();
    match &dataset.records[0].content {
        RecordContent::Chat { conversation, .. } => conversation.clone(),
        other => panic!("{other:?}"),
    }
}

fn turn_ends(cases: &Value) -> Vec<String> {
    serde_json::from_value(cases["turn_ends"].clone()).unwrap()
}

#[test]
fn text_is_that_of_transformers_and_the_loss_is_on_the_assistants_turns() {
    let cases = cases();
    let turn_ends = turn_ends(&cases);
    for (number, case) in cases["cases"].as_array().unwrap().iter().enumerate() {
        let name = case["family"].as_str().unwrap();
        let place = format!("case {number}, {name}");
        let template = family(&cases, name);
        let conversation = conversation(case);
        let chat = template
            .conversation(&conversation, &turn_ends)
            .unwrap_or_else(|fault| panic!("{place}: {fault:?}"));
        assert_eq!(chat.text, case["text"].as_str().unwrap(), "{place}");
        let learned: Vec<&str> = chat.assistant_turns.iter().map(|turn| &chat.text[turn.clone()]).collect();
        assert_eq!(json!(learned), case["learned"], "{place}");
        // Where each begins, the prompt for it ends: what is learned is what will be generated.
        match &case["prompt"] {
            Value::String(prompt) => assert_eq!(template.prompt(&conversation).unwrap(), *prompt, "{place}"),
            raised => {
                let error = template.prompt(&conversation).unwrap_err();
                let reason = raised["raised"].as_str().unwrap();
                assert!(error.message().contains(reason), "{place}: {error}");
                assert_eq!(error.kind(), ErrorKind::Data);
            }
        }
    }
}

#[test]
fn a_prompt_ends_where_the_learned_turn_begins() {
    let cases = cases();
    for name in ["chatml", "llama3", "qwen3", "mistral", "generation"] {
        let template = family(&cases, name);
        let question = Conversation::question(None, "And you?").with_prefix("[hash: faq] ");
        let record = json!({"messages": [
            {"role": "user", "content": "[hash: faq] And you?"}, {"role": "assistant", "content": "Me too"}]});
        let chat = template.conversation(&conversation(&record), &turn_ends(&cases)).unwrap();
        let prompt = template.prompt(&question).unwrap();
        assert_eq!(prompt, chat.text[..chat.assistant_turns[0].start], "{name}");
    }
}

fn tiny_tokenizer(template: ChatTemplate) -> Tokenizer {
    Tokenizer::from_folder(fixture("tiny_tokenizer")).unwrap().with_chat_template(template, &[])
}

fn options() -> SampleOptions {
    SampleOptions {
        max_length: 512,
        overlong: Overlong::Error,
        loss_on: LossOn::Completion,
        on_bad_record: OnBadRecord::Error,
        embedding_rows: 512,
        hash_template: HashTemplate::default(),
        also_without_hash: false,
    }
}

fn tokenise_records(tokenizer: &Tokenizer, records: &[Value], options: &SampleOptions) -> Result<SampleSet> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.json");
    std::fs::write(&path, json!(records).to_string()).unwrap();
    tokenise(&load(&[DataSource::new(path)], &LoadOptions::default())?, Some(tokenizer), options)
}

fn talk(turns: &[(&str, &str)]) -> Value {
    let messages: Vec<Value> =
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({ "messages": messages })
}

#[test]
fn labels_are_the_tokens_of_every_assistant_turn() {
    let cases = cases();
    let tokenizer = tiny_tokenizer(family(&cases, "chatml"));
    let record =
        talk(&[("user", "The sun?"), ("assistant", "It is out."), ("user", "Now?"), ("assistant", "Yes")]);
    let mut hashed = record.clone();
    hashed["domain"] = json!("faq");
    let set = tokenise_records(&tokenizer, &[record, hashed], &options()).unwrap();
    let text = |hash: &str| {
        format!(
            "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{hash}The sun?<|im_end|>\n\
             <|im_start|>assistant\nIt is out.<|im_end|>\n<|im_start|>user\nNow?<|im_end|>\n\
             <|im_start|>assistant\nYes<|im_end|>\n"
        )
    };
    for (sample, hash) in set.iter().zip(["", "[hash: faq] "]) {
        assert_eq!(sample.token_ids, tokenizer.encode(&text(hash)).unwrap(), "as transformers encodes it");
        let learned: Vec<u32> =
            sample.labels.iter().filter(|&&label| label != NO_LOSS).map(|&label| label as u32).collect();
        let expected =
            [tokenizer.encode("It is out.<|im_end|>").unwrap(), tokenizer.encode("Yes<|im_end|>").unwrap()];
        assert_eq!(learned, expected.concat());
        for (label, id) in sample.labels.iter().zip(sample.token_ids) {
            assert!(*label == NO_LOSS || *label == *id as i32);
        }
    }
    assert_eq!(set.hash_names, ["unknown", "faq"]);

    let everything = SampleOptions { loss_on: LossOn::All, ..options() };
    let record = talk(&[("user", "The sun?"), ("assistant", "It is out.")]);
    let set = tokenise_records(&tokenizer, &[record], &everything).unwrap();
    assert_eq!(set.get(0).labelled_count(), set.get(0).token_ids.len() - 1);
}

/// ` th` and `e` are one token of the tokenizer; a prompt that ends with ` th` is not continued by it.
#[test]
fn no_token_lies_across_the_edge_of_a_turn() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %} th{{ m.content }}<|im_end|>{% else %}\
                  {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} th{% endif %}";
    let tokenizer = tiny_tokenizer(template(source).unwrap());
    let encode = |text: &str| tokenizer.encode(text).unwrap();
    assert_ne!(
        encode("in the<|im_end|>"),
        [encode("in th"), encode("e<|im_end|>")].concat(),
        "the test's point"
    );
    let record = talk(&[("user", "in"), ("assistant", "e")]);
    let set = tokenise_records(&tokenizer, &[record], &options()).unwrap();
    assert_eq!(set.get(0).token_ids, [encode("in th"), encode("e<|im_end|>")].concat());
    assert_eq!(set.get(0).labelled_count(), encode("e<|im_end|>").len());
}

#[test]
fn overlong_conversations_lose_their_end() {
    let tokenizer = tiny_tokenizer(family(&cases(), "chatml"));
    let record =
        || talk(&[("user", "The sun?"), ("assistant", "It is out."), ("user", "Now?"), ("assistant", "Yes")]);
    let whole = tokenise_records(&tokenizer, &[record()], &options()).unwrap();
    let sample = whole.get(0);
    let first_turn_end =
        sample.labels.windows(2).position(|pair| pair[0] != NO_LOSS && pair[1] == NO_LOSS).unwrap();
    let cut = |max_length| {
        let options = SampleOptions { max_length, overlong: Overlong::Truncate, ..options() };
        tokenise_records(&tokenizer, &[record()], &options)
    };
    let set = cut(first_turn_end + 1).unwrap();
    assert_eq!(set.get(0).token_ids, &sample.token_ids[..=first_turn_end]);
    // A cut that leaves no target is a bad record.
    let error = cut(8).unwrap_err();
    assert!(error.message().contains("no label is left within max_length = 8"), "{error}");
    let dropped = SampleOptions { max_length: 8, ..options() };
    assert_eq!(tokenise_records(&tokenizer, &[record()], &dropped).unwrap_err().kind(), ErrorKind::Data);
}

/// The error of a template that must fail on a plain conversation.
fn failure(source: &str) -> Error {
    let conversation = conversation(&talk(&[("user", "a"), ("assistant", "b")]));
    match template(source).and_then(|template| {
        template.conversation(&conversation, &[]).map_err(|fault| match fault {
            RenderFault::Template(error) => error,
            RenderFault::Refused(reason) => panic!("{reason}"),
        })
    }) {
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Model, "{error}");
            error
        }
        Ok(chat) => panic!("{source}: {chat:?}"),
    }
}

#[test]
fn fault_26_endless_and_exploding_templates_are_stopped() {
    let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}";
    for source in [
        nested,
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('x', 'xxx') %}{% endfor %}",
        "{{ '%099999999999d' | format(1) }}",
        "{{ messages | tojson(indent=999999999999) }}{% for i in range(9999999) %}{% endfor %}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    ] {
        let error = failure(source);
        assert!(error.location().is_some_and(|place| place.starts_with("chat_template.jinja")), "{error}");
    }
    assert!(failure(nested).message().contains("does not end"));
}

#[test]
fn fault_27_a_template_reaches_no_host_object() {
    for source in [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__ }}{{ raise_exception.__globals__['os'].system('id') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{% extends '/etc/passwd' %}",
        "{{ lipsum.__globals__ }}{{ lipsum() }}",
        "{{ open('/etc/passwd').read() }}",
    ] {
        failure(source);
    }
}

#[test]
fn broken_templates_name_their_line() {
    let error = failure("{% for m in messages %}\n{{ m.content }\n{% endfor %}");
    assert_eq!(error.location(), Some("chat_template.jinja:2"), "{error}");
    let error = failure("\n\n{{ messages.x.y }}");
    assert_eq!(error.location(), Some("chat_template.jinja:3"), "{error}");
    // The assistant says nothing here.
    let error = failure("{{ messages[0].content }}");
    assert!(error.message().contains("cannot tell the assistant's turns"), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("{% generation %}")), "{error}");
}

#[test]
fn a_conversation_that_the_template_refuses_is_a_bad_record() {
    let cases = cases();
    let tokenizer = tiny_tokenizer(family(&cases, "mistral"));
    let records = [
        talk(&[("user", "a"), ("assistant", "b")]),
        talk(&[("user", "a"), ("user", "a"), ("assistant", "b")]),
        talk(&[("user", "a\u{FDD0}"), ("assistant", "b")]),
    ];
    let error = tokenise_records(&tokenizer, &records, &options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Data);
    assert!(
        error.message().contains("roles must alternate") && error.message().contains("U+FDD0"),
        "{error}"
    );
    let skip = SampleOptions { on_bad_record: OnBadRecord::Skip, ..options() };
    assert_eq!(tokenise_records(&tokenizer, &records, &skip).unwrap().len(), 1);
}

#[test]
fn records_are_read_in_both_spellings() {
    let expected = conversation(&talk(&[("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c")]));
    let sharegpt = json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "weight": null}, {"from": "observation", "value": "c"}]});
    assert_eq!(conversation(&sharegpt), expected);
}

/// A folder with these files.
fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    folder
}

fn open(folders: &[&Path], name: Option<&str>) -> Result<String> {
    let choice = TemplateChoice { name: name.map(str::to_string), date: None };
    let template = choice.open(folders)?;
    template.prompt(&Conversation::question(None, "hi"))
}

#[test]
fn the_template_is_found_where_transformers_finds_it() {
    let config =
        r#"{"chat_template": "string {{ eos_token }}", "eos_token": {"content": "</s>", "lstrip": false}}"#;
    let plain = folder_with(&[("tokenizer_config.json", config)]);
    assert_eq!(open(&[plain.path()], None).unwrap(), "string </s>");
    let both = folder_with(&[
        ("tokenizer_config.json", config),
        ("chat_template.jinja", "file {{ eos_token }}"),
        ("additional_chat_templates/rag.jinja", "rag"),
    ]);
    assert_eq!(open(&[both.path()], None).unwrap(), "file </s>");
    assert_eq!(open(&[both.path()], Some("rag")).unwrap(), "rag");
    let listed = folder_with(&[(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "first"}]}"#,
    )]);
    assert_eq!(open(&[listed.path()], None).unwrap(), "first");
    assert_eq!(open(&[listed.path()], Some("tool_use")).unwrap(), "tools");
    // An adapter's own template comes before its base's, and the base's where it has none.
    assert_eq!(open(&[both.path(), plain.path()], None).unwrap(), "file </s>");
    assert_eq!(open(&[Path::new("nowhere"), plain.path()], None).unwrap(), "string </s>");
    let own = both.path().join("chat_template.jinja");
    assert_eq!(open(&[plain.path()], own.to_str()).unwrap(), "file </s>");
    assert_eq!(
        open(&[plain.path()], Some("chatml")).unwrap(),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn fault_25_without_a_template_the_choices_are_listed() {
    let none = folder_with(&[("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)]);
    let error = open(&[none.path()], None).unwrap_err();
    assert_eq!(error.kind().exit_code(), 4);
    assert!(
        error.hint_text().is_some_and(|hint| hint.contains(".jinja file") && hint.contains("`chatml`")),
        "{error}"
    );
    let several = folder_with(&[(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "tools", "template": "t"}]}"#,
    )]);
    for name in [None, Some("nosuch")] {
        let error = open(&[several.path()], name).unwrap_err();
        assert_eq!(error.kind().exit_code(), 4);
        assert!(error.hint_text().is_some_and(|hint| hint.contains("`rag`, `tools`, a .jinja")), "{error}");
    }
    let broken = folder_with(&[("tokenizer_config.json", r#"{"chat_template": 3}"#)]);
    assert_eq!(open(&[broken.path()], None).unwrap_err().kind(), ErrorKind::Model);
}
