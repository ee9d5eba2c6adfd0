//! `docs/faults.md` names every test of a fault, and no other.

use std::collections::BTreeSet;
use std::path::Path;

/// The names of the functions `fault_NN_…` that are defined below `folder`.
fn defined(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            defined(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let functions = text.lines().filter_map(|line| line.trim_start().strip_prefix("fn fault_"));
            names.extend(functions.filter_map(|rest| Some(format!("fault_{}", rest.split_once('(')?.0))));
        }
    }
}

#[test]
fn every_fault_of_the_table_has_its_tests_and_every_test_its_line() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut tests = BTreeSet::new();
    defined(&root.join("src"), &mut tests);
    defined(&root.join("tests"), &mut tests);

    let table = std::fs::read_to_string(root.join("docs/faults.md")).unwrap();
    let mut listed = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for line in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| fault")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, number, promise, names, _] = cells[..] else { panic!("{line}") };
        assert!(!promise.is_empty(), "{line}");
        let number: u32 = number.parse().unwrap();
        for name in names.split(", ") {
            let name = name.trim_matches('`');
            assert!(name.starts_with(&format!("fault_{number:02}_")), "{name} in line {number}");
            listed.insert(name.to_string());
        }
        numbers.insert(number);
    }
    assert_eq!(listed.difference(&tests).collect::<Vec<_>>(), Vec::<&String>::new(), "listed, but no test");
    assert_eq!(
        tests.difference(&listed).collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "tests that are not listed"
    );
    for number in 1..=66 {
        assert!(numbers.contains(&number), "fault {number} has no test");
    }
}
