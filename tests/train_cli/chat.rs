//! Conversations through the binary: trained, generated from with the same text, refused with their place.

use serde_json::{Value, json};

use crate::workspace::Workspace;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn talk(question: &str, answer: &str, hash: Option<&str>) -> Value {
    json!({ "hash": hash, "messages": [
        {"role": "user", "content": question}, {"role": "assistant", "content": answer}] })
}

/// A folder with a model that has `template`, and these lines as `train.jsonl`.
fn workspace(template: Option<&str>, records: &[Value]) -> Workspace {
    let workspace = Workspace::new();
    workspace.text_model("model");
    if let Some(template) = template {
        workspace.write("model/chat_template.jinja", template);
    }
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    workspace.write("train.jsonl", lines.join("\n"));
    workspace
}

const TRAIN: [&str; 10] =
    ["-m", "model", "--train-data", "train.jsonl", "--val-data", "none", "-o", "out", "--max-steps", "2"];

#[test]
fn generation_reads_what_training_read() {
    let workspace =
        workspace(None, &[talk("The sun?", "It is out.", Some("faq")), talk("Now?", "Yes", None)]);
    workspace.write("own.jinja", TEMPLATE);
    workspace.train(&[&TRAIN[..], &["--chat-template", "own.jinja"]].concat()).succeeded();
    let learned: u64 =
        workspace.steps("out").iter().map(|step| step["labelled_tokens"].as_u64().unwrap()).sum();
    assert!(learned > 0);
    // The adapter brings its template, and says how it is used.
    assert_eq!(std::fs::read_to_string(workspace.path("out/chat_template.jinja")).unwrap(), TEMPLATE);
    let card = std::fs::read_to_string(workspace.path("out/README.md")).unwrap();
    assert!(card.contains("fastlora generate --chat --adapter"), "{card}");

    let generate = ["generate", "--adapter", "out", "--json", "--max-new-tokens", "1"];
    let prompt = |arguments: &[&str]| {
        let result = workspace.run(&[&generate, arguments].concat()).succeeded().json();
        result["cases"][0]["prompt"].as_str().unwrap().to_string()
    };
    assert_eq!(
        prompt(&["--chat", "--hash", "faq", "--prompt", "The sun?"]),
        "<|im_start|>user\n[hash: faq] The sun?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        prompt(&["--chat", "--system", "Be brief.", "--prompt", "Now?"]),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nNow?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(prompt(&["--prompt", "Now?"]), "[hash: unknown] User: Now?\nAssistant:");

    let evaluate = ["evaluate", "--adapter", "out", "--json", "train.jsonl"];
    let figures = workspace.run(&evaluate).succeeded().json();
    assert_eq!(
        figures["overall"]["labelled_tokens"].as_u64(),
        Some(learned / 2),
        "two steps over the same two"
    );

    workspace
        .run(&[&generate[..], &["--chat-template", "chatml", "--prompt", "a"]].concat())
        .refused(2, &["--chat"]);
}

#[test]
fn the_day_is_part_of_the_configuration_as_resolved() {
    let template = format!("{{{{ strftime_now('%d %b %Y') }}}}\n{TEMPLATE}");
    let workspace = workspace(Some(&template), &[talk("a", "b", None)]);
    let log = workspace.train(&TRAIN).succeeded().stderr;
    assert!(log.contains("this run has chat_date 20"), "{log}");
    let resolved = || -> Value {
        serde_json::from_slice(&std::fs::read(workspace.path("out/training_config.json")).unwrap()).unwrap()
    };
    let today = resolved()["chat_date"].as_str().unwrap().to_string();
    let again = [&TRAIN[..], &["--overwrite", "--chat-date", "2026-01-31"]].concat();
    let log = workspace.train(&again).succeeded().stderr;
    assert!(!log.contains("this run has chat_date"), "{log}");
    assert_eq!(resolved()["chat_date"], "2026-01-31");
    assert_ne!(today, "2026-01-31");
    let wrong = [&TRAIN[..], &["--set", "chat_date=31 January"]].concat();
    workspace.train(&wrong).refused(2, &["chat_date"]);
}

#[test]
fn fault_25_conversations_without_a_template_are_refused_with_the_choices() {
    let workspace = workspace(None, &[talk("a", "b", None)]);
    workspace.train(&TRAIN).refused(4, &["chat template", "a .jinja file, `chatml`"]);
    let named = [&TRAIN[..], &["--chat-template", "mine"]].concat();
    workspace.train(&named).refused(4, &["mine", "no such chat template", "`chatml`"]);
    assert!(!workspace.path("out").exists());
    // Where there is no conversation a broken template does no harm.
    workspace.write("model/chat_template.jinja", "{% if %}");
    workspace.train(&TRAIN).refused(4, &["chat_template.jinja:1", "does not compile"]);
    workspace.write("train.jsonl", r#"{"instruction": "a", "output": "b"}"#);
    workspace.train(&TRAIN).succeeded();
}

#[test]
fn fault_26_an_endless_template_is_stopped() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}";
    let workspace = workspace(Some(endless), &[talk("a", "b", None)]);
    workspace.train(&TRAIN).refused(4, &["train.jsonl:1", "chat_template.jinja:1", "does not end"]);
}

#[test]
fn fault_27_a_template_that_reaches_for_the_host_is_refused() {
    let hostile = "{{ messages.__class__.__init__.__globals__.os.system('touch out') }}";
    let workspace = workspace(Some(hostile), &[talk("a", "b", None)]);
    workspace.train(&TRAIN).refused(4, &["train.jsonl:1", "the chat template fails"]);
    assert!(!workspace.path("out").exists());
}

#[test]
fn fault_28_a_template_gets_no_second_bos_and_doubled_ones_are_found() {
    // Llama 3's way: the tokenizer puts BOS in front of a text, and the template writes it too.
    let template = format!("{{{{ bos_token }}}}{TEMPLATE}");
    let workspace = workspace(Some(&template), &[talk("a", "b", None)]);
    let tokenizer = std::fs::read_to_string(workspace.path("model/tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}});
    workspace.write("model/tokenizer.json", tokenizer.to_string());
    let config = json!({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"});
    workspace.write("model/tokenizer_config.json", config.to_string());
    let log = workspace.train(&TRAIN).succeeded().stderr;
    assert!(!log.contains("BOS twice") && !log.contains("EOS is in no"), "{log}");
    workspace.write("model/chat_template.jinja", format!("{{{{ bos_token }}}}{template}"));
    let log = workspace.train(&[&TRAIN[..], &["--overwrite"]].concat()).succeeded().stderr;
    assert!(log.contains("begins with BOS twice: train.jsonl:1"), "{log}");
}

#[test]
fn fault_36_unknown_roles_are_refused_or_skipped() {
    let robot =
        json!({"messages": [{"role": "robot", "content": "1"}, {"role": "assistant", "content": "2"}]});
    let workspace = workspace(Some(TEMPLATE), &[talk("a", "b", None), robot]);
    let named =
        ["train.jsonl:2", "`messages`[0]: unknown role `robot`", "system, developer, user, assistant, tool"];
    workspace.train(&TRAIN).refused(3, &named);
    let log = workspace.train(&[&TRAIN[..], &["--on-bad-record", "skip"]].concat()).succeeded().stderr;
    assert!(log.contains("1 of 2 records used, 1 skipped"), "{log}");
}

#[test]
fn conversations_with_nothing_to_learn_are_bad_records() {
    let ask = json!({"messages": [{"role": "user", "content": "1"}]});
    let answer = json!({"hash": "faq", "messages": [{"role": "assistant", "content": "1"}]});
    let empty = json!({"messages": []});
    let workspace = workspace(Some(TEMPLATE), &[ask, answer, empty]);
    let parts = [
        "train.jsonl:1",
        "no assistant turn",
        "train.jsonl:2: the conversation has a hash and no user turn",
        "empty",
    ];
    workspace.train(&TRAIN).refused(3, &parts);
}

#[test]
fn fault_42_control_characters_of_conversations_and_templates_never_reach_the_terminal() {
    let refuse = "{% for m in messages %}{{ raise_exception('\u{1b}[31m' + m.role) }}{% endfor %}";
    let robot = json!({"messages": [{"role": "\u{1b}[2Jrobot", "content": "1"}]});
    for (template, record) in [(refuse, talk("a", "b", None)), (TEMPLATE, robot)] {
        let finished = workspace(Some(template), &[record]).train(&TRAIN).refused(3, &["\\u{1b}["]);
        assert!(!finished.stderr.contains('\u{1b}'), "{:?}", finished.stderr);
    }
}
