//! Comments in JSON, for configurations that explain themselves.

/// The text with `// …` and `/* … */` outside of strings as blanks, so that every byte keeps its place; and with no
/// comma after the last entry of an object or list.
pub(super) fn blank_comments(text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let mut place = 0;
    let mut comma = None;
    while place < bytes.len() {
        let rest = &bytes[place..];
        match rest[0] {
            b'"' => {
                comma = None;
                place += string_length(rest);
            }
            b'/' if matches!(rest.get(1), Some(b'/' | b'*')) => {
                let length = comment_length(rest);
                for byte in &mut bytes[place..place + length] {
                    // Line breaks stay for the numbers of lines.
                    if *byte != b'\n' {
                        *byte = b' ';
                    }
                }
                place += length;
            }
            byte => {
                match byte {
                    b',' => comma = Some(place),
                    b'}' | b']' => {
                        if let Some(comma) = comma.take() {
                            bytes[comma] = b' ';
                        }
                    }
                    b' ' | b'\t' | b'\r' | b'\n' => {}
                    _ => comma = None,
                }
                place += 1;
            }
        }
    }
    // Whole characters were replaced by ASCII ones, or left as they were.
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_string())
}

/// Bytes of the string that begins here, up to the end where it is not closed.
fn string_length(text: &[u8]) -> usize {
    let mut place = 1;
    while let Some(byte) = text.get(place) {
        match byte {
            b'"' => return place + 1,
            b'\\' => place += 2,
            _ => place += 1,
        }
    }
    text.len()
}

/// Bytes of the comment that begins here, without the line break that ends it.
fn comment_length(text: &[u8]) -> usize {
    if text[1] == b'/' {
        return text.iter().position(|&byte| byte == b'\n').unwrap_or(text.len());
    }
    let end = text[2..].windows(2).position(|pair| pair == b"*/");
    end.map_or(text.len(), |end| end + 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_become_blanks_and_strings_stay() {
        for (text, blanked) in [
            ("{\"a\": 1} // é\n", "{\"a\": 1}      \n"),
            ("{/* x\n y */\"a\": \"// no\"}", "{    \n     \"a\": \"// no\"}"),
            ("{\"a\": \"\\\"//\", // x", "{\"a\": \"\\\"//\",     "),
            ("[1, 2, // last\n]", "[1, 2         \n]"),
            ("{\"a\": [1,], \"b\": 2,}", "{\"a\": [1 ], \"b\": 2 }"),
            ("{\"a\": \",]\"}", "{\"a\": \",]\"}"),
            ("1 /* open", "1        "),
            ("\"open // ", "\"open // "),
            ("/", "/"),
            ("", ""),
        ] {
            assert_eq!(blank_comments(text), blanked, "{text}");
        }
    }

    #[test]
    fn json_without_comments_is_unchanged() {
        let text = "{\"a\": [1, {\"b\": \"x, /* y */ \\\\\"}], \"c\": \"é\"}";
        assert_eq!(blank_comments(text), text);
    }
}
