use super::*;
use crate::error::ErrorKind;

fn options(pairs: &[&str]) -> Result<Options> {
    Options::from_pairs(&pairs.iter().map(|pair| pair.to_string()).collect::<Vec<_>>())
}

fn resolve(pairs: &[&str]) -> Result<TrainingConfig> {
    TrainingConfig::resolve(&options(pairs)?)
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = resolve(&[]).unwrap();
    assert_eq!(config.model_name, "HuggingFaceTB/SmolLM2-135M-Instruct");
    assert_eq!((config.lora_r, config.lora_alpha, config.lora_dropout), (8, 16.0, 0.05));
    assert_eq!((config.learning_rate, config.max_length, config.batch_size), (2e-4, 512, 4));
    assert_eq!(config.val_data, Some(vec![DataSource::new("data/val_data.json")]));
}

#[test]
fn a_resolved_configuration_resolves_to_itself() {
    for pairs in [
        &[][..],
        &["val_data=null", "max_steps=7", r#"lora_target_modules="all-linear""#],
        &[
            r#"rank_pattern={"v_proj": 2, "q_proj": 16}"#,
            r#"alpha_pattern={"q_proj": 0.5}"#,
            "layers_to_transform=[3, 1]",
        ],
    ] {
        let config = resolve(pairs).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_string_pretty(&config).unwrap()).unwrap();
        let again = TrainingConfig::resolve(&Options::from_file(file.path()).unwrap()).unwrap();
        assert_eq!(again, config);
    }
}

#[test]
fn higher_options_win_and_null_means_no_validation() {
    let low = options(&["seed=1", "batch_size=8", "val_data=a.json"]).unwrap();
    let merged = options(&["seed=2", "val_data=null"]).unwrap().or(&low);
    let config = TrainingConfig::resolve(&merged).unwrap();
    assert_eq!((config.seed, config.batch_size, config.val_data), (2, 8, None));
}

#[test]
fn fault_43_unknown_key_names_the_nearest() {
    let error = resolve(&["lerning_rate=1"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("did you mean `learning_rate`"), "{error}");
}

#[test]
fn fault_44_values_out_of_range_name_the_range() {
    for pair in [
        "lora_r=0",
        "learning_rate=-1",
        "learning_rate=0",
        "loraplus_lr_ratio=0",
        "neftune_noise_alpha=-5",
        "batch_size=0",
        "lora_dropout=1",
        "max_length=1",
        "adam_beta2=1.5",
        "max_steps=0",
        "val_every=0",
        "sample_every=0",
        "keep_checkpoints=0",
        "early_stopping_patience=0",
        "val_fraction=1",
        "val_fraction=-0.1",
        "lora_dropout=0.9999999999",
        "adam_epsilon=1e-300",
        "max_length=33554432",
        "num_epochs=0",
        "max_grad_norm=0",
        "hash_dropout=1.1",
        "hash_dropout=-0.1",
    ] {
        let error = resolve(&[pair]).unwrap_err();
        let key = pair.split('=').next().unwrap();
        assert_eq!(error.location(), Some(key), "{error}");
        assert!(error.hint_text().is_some_and(|hint| hint.starts_with("it must be")), "{error}");
    }
    for (pair, part) in [
        (r#"rank_pattern={"q_proj": 8, "v_proj": 0}"#, "`v_proj`: 0"),
        (r#"alpha_pattern={"v_proj": -1}"#, "`v_proj`: -1"),
        (r#"rank_pattern={"(": 8}"#, "regular expression"),
        ("layers_to_transform=[-1]", "invalid value"),
    ] {
        let error = resolve(&[pair]).unwrap_err();
        assert!(error.location().is_some_and(|place| pair.starts_with(place.trim_start_matches("--set "))));
        assert!(error.message().contains(part), "{error}");
    }
    let regular = ["layers_to_transform=[0]", "lora_target_modules=all-linear"];
    assert_eq!(resolve(&regular).unwrap_err().location(), Some("layers_to_transform"));
    for pair in ["threads=0", "threads=100000"] {
        assert_eq!(resolve(&[pair]).unwrap_err().location(), Some("threads"));
    }
    let error = TrainingConfig::resolve(&Options { learning_rate: Some(f64::NAN), ..Options::default() });
    assert_eq!(error.unwrap_err().location(), Some("learning_rate"));
}

#[test]
fn fault_44_empty_names_are_refused() {
    for pair in ["test_cases=", "output_dir=", "model_name=", "chat_template=", "train_data=", "val_data="] {
        let error = resolve(&[pair]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{pair}");
        assert_eq!(error.location(), pair.split('=').next(), "{error}");
    }
}

#[test]
fn validation_has_one_source() {
    let config = resolve(&["val_fraction=0.1"]).unwrap();
    assert_eq!((config.val_data, config.val_fraction), (None, Some(0.1)));
    let error = resolve(&["val_fraction=0.1", "val_data=a.json"]).unwrap_err();
    assert_eq!(error.location(), Some("val_fraction"));
    let error = resolve(&["early_stopping_patience=2", "val_data=null"]).unwrap_err();
    assert_eq!(error.location(), Some("early_stopping_patience"));
}

#[test]
fn what_excludes_another_is_refused() {
    for (pairs, place) in [
        (&["bucket_by_length=true", "packing=true"][..], "bucket_by_length"),
        (&["bucket_by_length=true", "shuffle=false"], "bucket_by_length"),
        (&[r#"val_data=[{"path": "a.json", "weight": 2}]"#], "val_data"),
    ] {
        let error = resolve(pairs).unwrap_err();
        assert_eq!((error.kind(), error.location()), (ErrorKind::Config, Some(place)), "{error}");
    }
    resolve(&["bucket_by_length=true"]).unwrap();
    resolve(&["packing=true", "shuffle=false", r#"train_data={"path": "a.json", "weight": 0.5}"#]).unwrap();
}

#[test]
fn samples_need_prompts() {
    let config = resolve(&["sample_every=10", "test_cases=a.json", "report=[]"]).unwrap();
    assert_eq!((config.sample_every, config.report), (Some(10), vec![]));
    assert_eq!(resolve(&["sample_every=10"]).unwrap_err().location(), Some("sample_every"));
}

#[test]
fn wrong_types_name_the_key() {
    for pair in ["report=[\"pdf\"]", "lora_r=-3", "lora_r=many", "shuffle=3", "loss_on=some", "train_data=3"]
    {
        let error = resolve(&[pair]).unwrap_err();
        let key = pair.split('=').next().unwrap();
        assert!(error.to_string().contains(key), "{error}");
    }
}
